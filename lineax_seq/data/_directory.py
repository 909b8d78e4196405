"""Folders of results that are there whole or not at all, and that show when they are no longer what was written."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

_ABANDONED = 24 * 3600  # seconds since anything was written to a folder that nobody will finish


@contextlib.contextmanager
def writing(directory: Path) -> Generator[None, None, None]:
    """Turns what the system refuses, such as a full disk, into a sentence that names the folder.

    Raises:
      ValueError: whatever is written in the block cannot be.
    """
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "mend that"
        raise ValueError(
            f"write_tokens: {str(directory)!r} cannot be written ({error.strerror or error}); {remedy}, "
            "or choose another directory."
        ) from error


@contextlib.contextmanager
def new_directory(
    directory: Path, gives_way: Callable[[Path], bool] = lambda there: False
) -> Generator[Path, None, None]:
    """A temporary folder beside `directory`, renamed to it when the block ends, removed if the block raises.

    If by then there is something under that name, which another process may have put there, `gives_way(directory)`
    decides whether it is replaced, or stays and the temporary folder is removed. Nobody sees a folder half written or
    half removed: it is renamed first. One that a killed process left is removed a day later.

    Raises:
      ValueError: the folder cannot be written.
    """
    with writing(directory):
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        temporary = _beside(directory)
        temporary.mkdir()
    try:
        yield temporary
        with writing(directory):
            while not _renamed(temporary, directory):
                if not gives_way(directory):
                    break
                aside = _beside(directory)
                with contextlib.suppress(FileNotFoundError):  # another process was faster
                    os.rename(directory, aside)
                shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _beside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.{uuid.uuid4().hex[:12]}.partial")


def _remove_abandoned(directory: Path) -> None:
    for path in directory.parent.glob(f".{glob.escape(directory.name)}.{'[0-9a-f]' * 12}.partial"):
        with contextlib.suppress(OSError):  # another process finishes or removes it
            newest = max(part.stat().st_mtime for part in (path, *path.rglob("*")))
            if time.time() - newest > _ABANDONED:  # a date, as files have
                shutil.rmtree(path, ignore_errors=True)


def _renamed(temporary: Path, directory: Path) -> bool:
    """Whether the name was free, an empty folder counting as nothing."""
    try:
        os.rename(temporary, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def seal(directory: Path, name: str, record: dict[str, Any]) -> None:
    """Writes `record` and the SHA-256 of every other file in the folder to the file `name`, which is the last one."""
    record = record | {"sha256": {path: _sha256(directory / path) for path in sorted(files_of(directory))}}
    record["seal"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    (directory / name).write_text(json.dumps(record, indent=1), encoding="utf-8")


def read_seal(directory: Path, name: str) -> dict[str, Any] | None:
    """What `seal` wrote, or None where that cannot be read or is no longer the same."""
    try:
        record = json.loads((directory / name).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    digest = record.pop("seal", None)
    return record if digest == hashlib.sha256(json.dumps(record).encode()).hexdigest() else None


def damage(directory: Path, record: dict[str, Any]) -> str | None:
    """What of a folder is no longer as `seal` found it and wrote into `record`, or None."""
    for path, digest in record["sha256"].items():
        try:
            if _sha256(directory / path) != digest:
                return f"{path} is not what was written"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return None


def files_of(directory: Path) -> set[str]:
    """Everything in the folder and its folders that is no folder, as paths relative to it."""
    return {
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if os.path.islink(path) or not os.path.isdir(path)
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()

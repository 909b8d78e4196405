"""The folder of one run: its configuration as given, what was resolved from it, and whether it may be continued.

config.json      configuration, resolved seed and steps, package versions, git commit
metrics.jsonl    one JSON object a line: training metrics and evaluations by step
checkpoints/     one folder a step
tensorboard/     the same metrics for TensorBoard
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..core.checks import nearest

Resume = Literal["auto", "must", "never"]

_PACKAGES = ("lineax_seq", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def to_json(config: Any) -> Any:
    """A frozen dataclass as plain JSON values; tuples become lists."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_json(x) for x in config]
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise ValueError(f"to_json: {config!r} is a {type(config).__name__}; a configuration holds plain values only")


def from_json(cls: Any, values: Any, where: str = "config.json") -> Any:
    """The dataclass `cls` that `to_json` wrote.

    Raises:
      ValueError: `values` has a name that `cls` lacks (the nearest one is told), or lacks one that has no default.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where}: got {values!r}; an object with the fields of {cls.__name__} is wanted here")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise ValueError(
                f"{where}: {cls.__name__} has no field {name!r}{nearest(name, known)}. It was written by another "
                "version: train anew, or use that version"
            )
    return cls(**{name: _value(hints[name], v, f"{where}: {name}") for name, v in values.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)
    if isinstance(value, list):
        return tuple(_value(None, v, where) for v in value)
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        records = [h for h in typing.get_args(hint) if dataclasses.is_dataclass(h)]
        if records and isinstance(value, dict):
            return from_json(records[0], value, where)
    if (hint is float or (typing.get_args(hint) and float in typing.get_args(hint))) and type(value) is int:
        return float(value)
    return value


def differences(old: Any, new: Any, ignore: frozenset[str] = frozenset(), prefix: str = "") -> list[str]:
    """Fields whose values differ, as "optimizer.learning_rate: 0.001 there, 0.002 here"; `ignore` holds such names."""
    found = []
    for f in dataclasses.fields(new):
        name, a, b = prefix + f.name, getattr(old, f.name), getattr(new, f.name)
        if name in ignore:
            continue
        if dataclasses.is_dataclass(a) and type(a) is type(b):
            found += differences(a, b, ignore, name + ".")
        elif a != b:
            found.append(f"{name}: {a!r} there, {b!r} here")
    return found


@dataclass
class RunDirectory:
    """An opened run folder; `resolved` holds what the run settled (`seed`, `steps`, ...) and survives a restart.

    `writes=False` (all processes but the first) leaves the disk alone.
    """

    path: Path
    config: Any
    resolved: dict[str, Any] = field(default_factory=dict)
    writes: bool = True

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def resolve(self, **values: Any) -> None:
        """Add to `resolved` and write config.json."""
        self.resolved.update(values)
        if not self.writes:
            return
        record = {
            "config": to_json(self.config),
            "resolved": self.resolved,
            "versions": _versions(),
            "git_commit": _git_commit(),
        }
        write_atomically(self.path / "config.json", json.dumps(record, indent=2) + "\n")


def load_run(path: str | Path, config_class: type) -> RunDirectory:
    """Configuration and resolved values of the run in `path`.

    Raises:
      ValueError: no such folder, or it holds no run.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"load_run: there is no folder {path}; give a run directory")
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"load_run: {path} holds no run: it has no config.json; give a run directory")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        config, resolved = record["config"], record["resolved"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"load_run: {file} is not a run's configuration ({error}); restore it or train anew"
        ) from error
    return RunDirectory(path, from_json(config_class, config, str(file)), dict(resolved))


def open_run(
    path: str | Path,
    config: Any,
    *,
    resolve: Callable[[], dict[str, Any]] = dict,
    resume: Resume = "auto",
    may_differ: frozenset[str] = frozenset(),
    writes: bool = True,
) -> RunDirectory:
    """Start a run in `path`, or take up the one that is there.

    auto continues a run whose configuration equals `config` but for the fields `may_differ`; must wants such a run to
    be there; never wants none to be. `resolve()` gives the first `resolved` values of a new run; nothing is written
    before it returns. Of several processes one `writes`; their `resolve()` returns when all have come that far.

    Raises:
      ValueError: whatever `resolve` refuses; or the folder holds another run (every differing field is told), a run
        under never, none under must, or files that are no run.
    """
    path = Path(path)
    if resume not in ("auto", "must", "never"):
        raise ValueError(f"open_run: resume is {resume!r}; choose auto, must or never")
    if (path / "config.json").exists():
        if resume == "never":
            raise ValueError(f"open_run: {path} already holds a run and resume is never; choose another run directory")
        run = load_run(path, type(config))
        if different := differences(run.config, config, may_differ):
            raise ValueError(
                f"open_run: {path} holds a run with another configuration:\n  "
                + "\n  ".join(different)
                + "\nTo continue that run, give it the same values; to start this one, choose another run directory "
                "or delete that one"
            )
        run.config, run.writes = config, writes
        return run
    if resume == "must":
        raise ValueError(f"open_run: {path} holds no run to resume; check the run directory, or use resume=auto")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"open_run: {path} exists and is not a run; choose an empty or new directory")
    check_place(path)
    to_json(config)  # refuses what it must before the folder is made
    run = RunDirectory(path, config, resolve(), writes)
    if writes:
        new = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        try:
            run.resolve()
        except OSError:
            if new:
                path.rmdir()
            raise
    return run


def check_place(path: Path) -> None:
    """Refuse a folder that cannot be made, or written to.

    Raises:
      ValueError: something above it, or at its place, is no folder, or one where this user may not write.
    """
    there = path
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{path}: {there} is no folder; choose another place")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{path}: you may not write in {there.absolute()}; choose another place")


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # run from a checkout, or an optional package that is not installed
    return found


def _git_commit() -> str | None:
    """Commit of the checkout this package lies in, with "+changes" if files differ from it; None outside of one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        tracked = git("ls-files", Path(__file__).name)
        return (
            git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "") if tracked else None
        )
    except (OSError, subprocess.SubprocessError):
        return None

"""The work folder: what stages made, and what is known of files, each kept under a key of everything that decides it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from patchslim.errors import Unavailable
from patchslim.records import atomic_path
from validate.bundle import digest

#: Nanoseconds that a file must have been left alone before what is known of it is kept: a file system's clock ticks every few
#: milliseconds (FAT: 2 s), and two writes within one tick leave the same times (the "racy" problem of git's index).
SETTLED_NS = 2_000_000_000


class StageCache:
    """Folders ``ROOT/STAGE-KEY``; each is whole or absent, so that a killed run resumes at the stage it was in.

    ``facts`` are the small things that are known about files, so that a second run need not read them all again.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.facts = FactStore(root / "facts")

    def path(self, stage: str, /, **inputs: object) -> Path:
        """The folder of ``stage`` for these inputs, whether it is there or not."""
        return self.root / f"{stage}-{key_of(inputs)}"

    def make(self, folder: Path, build: Callable[[Path], None]) -> bool:
        """Have ``build`` fill ``folder`` unless it is there; returns whether it had to. A failed build leaves nothing.

        Raises ``Unavailable`` where the work folder cannot be written.
        """
        if folder.is_dir():
            return False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=self.root))
        except OSError as error:
            raise Unavailable(f"{self.root}: the work folder cannot be written: {error}; pass --work DIR") from error
        try:
            build(part)
            try:
                part.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another run was faster: its folder holds the same
                    raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
        return True


class FactStore:
    """Facts ``FOLDER/KIND-KEY.json`` that are slow to find out: digests of files, what a model is, fingerprints of images.

    A fact is keyed by its inputs, by the code, and by path, size, times and inode of every file that it was found out from, so
    that a changed file is read again. Nothing is written before ``save``.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._new: dict[Path, tuple[Any, tuple[Path, ...]]] = {}
        self._states: dict[tuple[Path, ...], FileStates] = {}  # as they were when this run first asked

    def recall(self, kind: str, find_out: Callable[[], Any], *, files: Sequence[Path] | None = (), **inputs: object) -> Any:
        """The JSON value that ``find_out`` gives, or gave when these inputs and files were the same.

        Folders among ``files`` stand for all that is in them. None says that what the fact depends on cannot be seen: it is
        found out every time.
        """
        if files is None:
            return as_json(find_out())
        states = self.states(files)
        path = self.path(kind, states, **inputs)
        if path in self._new:
            return self._new[path][0]
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # not known yet, or damaged
            return json.loads(path.read_text(encoding="utf-8"))["value"]
        started = time.time_ns()
        value = as_json(find_out())
        if all(state is not None and max(state.changed) < started - SETTLED_NS for _, state in states):
            self._new[path] = value, tuple(files)
        return value

    def path(self, kind: str, states: FileStates, **inputs: object) -> Path:
        """Where the fact about files in these states is, or will be."""
        return self.folder / f"{kind}-{key_of({'files': states, **inputs})}.json"

    def states(self, files: Sequence[Path]) -> FileStates:
        """``file_states`` of ``files`` as this run found them first."""
        key = tuple(files)
        if key not in self._states:
            self._states[key] = file_states(key)
        return self._states[key]

    def digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes, in hexadecimal; raises ``OSError``."""
        return str(self.recall("digest", lambda: digest(path), files=[path]))

    def save(self) -> None:
        """Keep what was found out, but of files that changed meanwhile; what cannot be written is found out again next time."""
        now = {files: file_states(files) for files in {files for _, files in self._new.values()}}
        with contextlib.suppress(OSError):
            for path, (value, files) in self._new.items():
                if now[files] == self._states[files]:
                    with atomic_path(path) as part:
                        part.write_text(json.dumps({"value": value}), encoding="utf-8")
        self._new.clear()


class FileState(NamedTuple):
    """What changes with a file: size in bytes, device and inode, and when content and inode changed, in nanoseconds."""

    size: int
    place: tuple[int, int]
    changed: tuple[int, int]


#: Absolute path and state of files; None for what is not there.
FileStates = list[tuple[str, FileState | None]]


def file_states(paths: Sequence[Path]) -> FileStates:
    """The state of every file in ``paths`` and in the folders among them, sorted by path."""
    return sorted((state for path in paths for state in _states_of(path.absolute())), key=lambda each: each[0])


def _states_of(path: Path) -> Iterator[tuple[str, FileState | None]]:
    if not path.is_dir():
        yield str(path), _state(str(path))
        return
    for folder, _, names in os.walk(path, followlinks=True):
        for name in names:
            full = os.path.join(folder, name)  # a data set may have a million of them
            yield full, _state(full)


def _state(path: str) -> FileState | None:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return FileState(found.st_size, (found.st_dev, found.st_ino), (found.st_mtime_ns, found.st_ctime_ns))


def as_json(value: Any) -> Any:
    """A value as it is when it is read back from JSON: tuples are lists."""
    return json.loads(json.dumps(value))


def key_of(inputs: dict[str, Any]) -> str:
    """Twenty hexadecimal digits that stand for these inputs and for the code."""
    text = json.dumps({"code": code_digest(), **inputs}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@functools.cache
def code_digest(root: Path = Path(__file__).parent.parent) -> str:
    """SHA-256 over this project's code and its libraries' versions: a stage made by other code is made again."""
    digest = hashlib.sha256()
    for room in ("export", "graph_passes", "patchslim", "slimming", "validate"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    digest.update(json.dumps(tool_versions()).encode())
    return digest.hexdigest()


@functools.cache
def tool_versions() -> dict[str, str]:
    """Installed versions of everything whose version can change a bundle."""
    ours = ("patchslim", "matplotlib", "numpy", "pillow", "scikit-learn", "timm", "torch", "torchvision")
    onnx = ("onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "onnxscript")
    versions = {}
    for name in (*ours, *onnx, "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx-cu13"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions

"""The work folder: what stages made, and what is known of files, each kept under a key of everything that decides it."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from patchslim.errors import InputRejected, PatchslimError, Unavailable, UsageError
from patchslim.files import digest, read_bounded
from patchslim.folders import disk_full, locked, sweep, temporary_folder, temporary_form
from patchslim.records import atomic_path

#: Nanoseconds that a file must have been left alone before what is known of it is kept: a file system's clock ticks every few
#: milliseconds (FAT: 2 s), and two writes within one tick leave the same times (the "racy" problem of git's index).
SETTLED_NS = 2_000_000_000


#: The file of a stage's folder that names the SHA-256 of every other one.
DIGESTS = "digests.json"
#: The file of what a stage found that a user has to know, if anything.
NOTES = "notes.json"
_MAX_DIGESTS = 1 << 20  # bytes: a stage has a dozen files
_TEMPORARY = temporary_form(r"\.[a-z]+-[0-9a-f]{20}\.", "")


class StageDamaged(Unavailable):
    """A file that a stage made is not what it was: ``folder`` has to be made anew."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: was damaged on its disk, again and again; pass --work DIR on another one")
        self.folder = path.parent


class StageCache:
    """Folders ``ROOT/STAGE-KEY``; each is whole or absent, so that a killed run resumes at the stage it was in.

    Each carries the digests of its files: one that was truncated or changed is told to ``say`` and made anew. ``facts`` are the
    small things that are known about files, so that a second run need not read them all again.
    """

    def __init__(self, root: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self.root = root
        self.facts = FactStore(root / "facts")
        self._say = say
        self._swept = False
        self._told: set[str] = set()

    def check(self) -> None:
        """Raise ``Unavailable`` where the work folder could not be written."""
        try:
            above = next(place for place in (self.root.absolute(), *self.root.absolute().parents) if place.exists())
            usable = above.is_dir() and os.access(above, os.R_OK | os.W_OK | os.X_OK)
            usable = usable and all(os.access(path, os.R_OK | os.X_OK) for path in self.root.glob("facts"))
        except OSError as error:
            raise self._unusable(error) from error
        if not usable:
            raise self._unusable(f"{above} is not a folder that may be entered and written")

    def path(self, stage: str, /, **inputs: object) -> Path:
        """The folder of ``stage`` for these inputs, whether it is there or not."""
        return self.root / f"{stage}-{key_of(inputs)}"

    def whole(self, folder: Path) -> bool:
        """Whether a stage's folder is there, with every file as it was made."""
        return folder.is_dir() and not self._fault(folder)

    def has(self, folder: Path) -> bool:
        """As ``whole``; a folder that is there and is not is removed, and that is said."""
        if not folder.is_dir():
            return False
        before = folder.stat().st_ino
        if fault := self._fault(folder):
            self.discard(folder, fault, before)
        return not fault

    def make(self, folder: Path, build: Callable[[Path], Sequence[str] | None]) -> bool:
        """Have ``build`` fill ``folder`` unless it is there and whole; returns whether it had to. A failed one leaves nothing.

        What ``build`` returns are notes for the user. They are kept with the stage, and told in every run that takes it.
        Raises ``Unavailable`` where the work folder cannot be written, ``UsageError`` where its disk is full.
        """
        made = self._make(folder, build)
        for note in _notes_of(folder) or ():
            if note not in self._told:
                self._told.add(note)
                self._say(note)
        return made

    def _make(self, folder: Path, build: Callable[[Path], Sequence[str] | None]) -> bool:
        self._sweep()
        if self.has(folder):
            return False
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with temporary_folder(f".{folder.name}.", "", self.root) as part:
                self._fill(part, build)
                try:
                    part.rename(folder)
                except OSError:
                    if not folder.is_dir():  # else another run was faster: its folder holds the same
                        raise
        except OSError as error:
            raise self._unusable(error) from error
        return True

    def discard(self, folder: Path, fault: str, inode: int | None = None) -> None:
        """Remove a damaged stage and say so, unless another run has put a new one there: one of another ``inode``."""
        self._say(f"{folder.name}: {fault}; it is made anew")
        try:
            with locked(self.root), temporary_folder(f".{folder.name}.", "", self.root) as part:
                if folder.is_dir() and inode in (None, folder.stat().st_ino):
                    folder.rename(part / "damaged")
        except OSError as error:
            raise self._unusable(error) from error
        self.facts.forget(folder)

    def read(self, path: Path) -> bytes:
        """A stage's file, read now and compared with its digest; raises ``StageDamaged``."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StageDamaged(path) from error
        if hashlib.sha256(data).hexdigest() != recorded_digest(path):
            raise StageDamaged(path)
        return data

    def verified(self, path: Path) -> Path:
        """``path``; where it is a stage's file, it is read now and compared with its digest. Raises ``StageDamaged``."""
        if path.parent.parent == self.root and (path.parent / DIGESTS).exists():
            try:
                found = digest(path)
            except OSError as error:
                raise StageDamaged(path) from error
            if found != recorded_digest(path):
                raise StageDamaged(path)
        return path

    def _fill(self, part: Path, build: Callable[[Path], Sequence[str] | None]) -> None:
        try:
            if notes := build(part):
                (part / NOTES).write_text(json.dumps(list(notes)), encoding="utf-8")
            names = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
            record = {name: digest(part / name) for name in names}
            (part / DIGESTS).write_text(json.dumps(record), encoding="utf-8")
        except PatchslimError:
            raise
        except Exception as error:  # of a library: not each says which
            if disk_full(error, self.root):
                raise UsageError(f"{self.root}: the work folder's disk is full; free some space or pass --work DIR") from error
            if isinstance(error, OSError):  # of what the stage reads, as a rule
                raise InputRejected(f"{part.name.split('-')[0].strip('.')}: {error}") from error
            raise

    def _fault(self, folder: Path) -> str:
        """What is wrong with a stage's folder; "" for nothing."""
        record = _record_of(folder)
        if record is None:
            return f"{DIGESTS} cannot be read"
        try:
            names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {DIGESTS}
            if names != set(record):
                return f"{min(names ^ set(record))} is {'missing' if names < set(record) else 'not of it'}"
            changed = [name for name in sorted(names) if self.facts.digest(folder / name) != record[name]]
        except OSError as error:
            return f"a file cannot be read: {error.strerror or error}"
        if changed:
            return f"{changed[0]} was changed or cut off"
        return "" if _notes_of(folder) is not None else f"{NOTES} cannot be read"

    def _sweep(self) -> None:
        """Once, whether or not a stage is to be made: a run that finds all of them must not leave what a killed one left."""
        if self._swept:
            return
        self._swept = True
        with contextlib.suppress(OSError):  # a folder that is not there, or cannot be read, is told of where it is used
            sweep(_TEMPORARY, self.root)
            sweep(r"\..+\.[0-9]+\.part", self.facts.folder)

    def _unusable(self, cause: object) -> PatchslimError:
        if isinstance(cause, BaseException) and disk_full(cause, self.root):
            return UsageError(f"{self.root}: the work folder's disk is full; free some space or pass --work DIR")
        return Unavailable(f"{self.root}: the work folder cannot be written: {cause}; pass --work DIR")


def recorded_digest(path: Path) -> str | None:
    """The SHA-256 that a stage's folder records of its file ``path``; None where there is no such record."""
    found = (_record_of(path.parent) or {}).get(path.name)
    return found if isinstance(found, str) else None


def _notes_of(folder: Path) -> list[str] | None:
    """What a stage has for the user; None where that is damaged."""
    if not (folder / NOTES).exists():
        return []
    with contextlib.suppress(InputRejected, ValueError, RecursionError):
        found = json.loads(read_bounded(folder / NOTES, _MAX_DIGESTS, "stage's notes"))
        if isinstance(found, list) and all(isinstance(note, str) for note in found):
            return found
    return None


def _record_of(folder: Path) -> dict[str, object] | None:
    """What a stage's folder records of its files; None where that is missing or damaged."""
    with contextlib.suppress(InputRejected, ValueError, RecursionError):
        found = json.loads(read_bounded(folder / DIGESTS, _MAX_DIGESTS, "record of digests"))
        return found if isinstance(found, dict) else None
    return None


def copy_verified(source: Path, target: Path) -> None:
    """Copy a file; where a stage made it, raise ``StageDamaged`` unless the copy has the digest that it was made with."""
    shutil.copyfile(source, target)
    if (source.parent / DIGESTS).exists() and digest(target) != recorded_digest(source):
        raise StageDamaged(source)


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
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["sha256"] == _sum(known["value"]):
                return known["value"]
        started = time.time_ns()
        value = as_json(find_out())
        if all(state is None or max(state.changed) < started - SETTLED_NS for _, state in states):
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

    def forget(self, folder: Path) -> None:
        """Find out anew what is asked about the files in ``folder``: others lie there now."""
        for files in [files for files in self._states if any(path.is_relative_to(folder) for path in files)]:
            del self._states[files]
        self._new = {path: known for path, known in self._new.items() if known[1] in self._states}

    def save(self) -> None:
        """Keep what was found out, but of files that changed meanwhile; what cannot be written is found out again next time."""
        now = {files: file_states(files) for files in {files for _, files in self._new.values()}}
        with contextlib.suppress(OSError):
            for path, (value, files) in self._new.items():
                if now[files] == self._states[files]:
                    with atomic_path(path) as part:
                        part.write_text(json.dumps({"value": value, "sha256": _sum(value)}), encoding="utf-8")
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


def _sum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
    onnx = ("onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-gpu", "onnxscript", "openvino", "nncf")
    versions = {}
    for name in (*ours, *onnx, "tensorrt-cu13", "tensorrt-cu12", "tensorrt-rtx-cu13"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions

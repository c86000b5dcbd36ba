"""WebDataset shards read by index: one scan notes where each sample's image lies, and reading opens one sample at a time.

What stays in memory is 16 bytes a sample, whatever the images weigh. A sample is the run of a tar file's members whose names
agree up to the first dot: an image and a ``.cls`` with its class as a decimal integer, or, where the data set's ``_info.json``
names an ``alt_label``, a ``.json`` that holds the class under that name (negative: the sample is left out, as by timm).
"""

from __future__ import annotations

import io
import json
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np

from patchslim.errors import InputRejected
from patchslim.files import read_bounded
from slimming.data.tar_headers import regular_files

IMAGE_SUFFIXES = ("jpg", "png", "webp", "jpeg", "ppm")  # timm's order first: the one read where a sample has several
_INFO_NAMES = ("_info.json", "info.json")
_COMPRESSED_NAME = re.compile(r"\.(tgz|tbz2?|txz|tzst|(tar\.)?(gz|bz2|xz|zst|lz4|z))$", re.IGNORECASE)
_COMPRESSED_START = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd")
_NAME = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)", re.DOTALL)  # webdataset's division of a member's name into key and suffix
_META = re.compile(r"__[^/]*__($|/)")  # webdataset's own records
_Place = tuple[int, int]  # offset and size of a member's content, in bytes
_SCANNERS = 4  # threads: a scan of shards that are not cached waits for the disk at every image
_LONGEST = {"cls": 64, "json": 1 << 24}  # bytes of a member that is read while indexing; anything longer is not what it says


class ShardReader:
    """The samples of ``shards``, ordered by shard name and then as they lie: reader[i] -> (encoded image's stream, class).

    It has the interface of timm's readers (``len``, ``filename``). Every read opens its shard anew, so that processes and
    threads share no file position, and a copy of the reader in another process has no open file.
    ``label`` is the field of the ``.json`` that holds the class; empty: the ``.cls`` does.
    Raises ``InputRejected`` naming the shard, and the sample where one is at fault.
    """

    def __init__(self, shards: Sequence[Path], label: str = "") -> None:
        self.label = label
        self.shards = sorted(str(path) for path in shards)
        with ThreadPoolExecutor(max(1, min(_SCANNERS, len(self.shards)))) as pool:
            found = list(pool.map(self._index, self.shards))
        self._starts = np.cumsum([0, *(len(offsets) for _, offsets, _, _ in found)])
        self._stamps = [stamp for stamp, _, _, _ in found]
        self._offsets = _joined([offsets for _, offsets, _, _ in found], np.int64)
        self._sizes = _joined([sizes for _, _, sizes, _ in found], np.uint32)
        self._classes = _joined([classes for _, _, _, classes in found], np.int32)

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def held_bytes(self) -> int:
        """The bytes that the index of the samples takes in memory, without the shards' names."""
        return sum(part.nbytes for part in (self._starts, self._offsets, self._sizes, self._classes))

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        """Return the encoded image and the class of sample ``index``. Raises ``OSError`` where the shard was changed since."""
        shard = self._shard_of(index)
        size = int(self._sizes[index])
        with open(self.shards[shard], "rb") as file:
            if _stamp(file) != self._stamps[shard]:
                raise OSError("the shard was changed after it was indexed")
            file.seek(int(self._offsets[index]))
            content = file.read(size)
        return io.BytesIO(content), int(self._classes[index])

    def filename(self, index: int) -> str:
        """Return the shard and the key of sample ``index``, for a message. The shard is scanned: keys are not held."""
        shard, offset = self.shards[self._shard_of(index)], int(self._offsets[index])
        try:
            with open(shard, "rb") as file:
                for key, _, place in _members(shard, file):
                    if place[0] == offset:
                        return f"{shard}: sample {key}"
        except (OSError, InputRejected):
            pass
        return f"{shard}: sample at byte {offset}"

    def _shard_of(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._starts, index, side="right")) - 1

    def _index(self, shard: str) -> tuple[tuple[int, int], array[int], array[int], array[int]]:
        """The shard's size and time, then the offset, size and class of every sample's image."""
        offsets, sizes, classes = array("q"), array("I"), array("i")
        try:
            with open(shard, "rb") as file:
                if hasattr(os, "posix_fadvise"):  # else the system reads ahead, and a scan of headers fetches every image
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                stamp = _stamp(file)
                for key, parts in _samples(shard, file):
                    target = _class_of(f"{shard}: sample {key}", parts, file, self.label)
                    image = next((parts[suffix] for suffix in IMAGE_SUFFIXES if suffix in parts), None)
                    if image is None:
                        kinds = ", ".join(sorted(parts))
                        raise InputRejected(
                            f"{shard}: sample {key}: has no image (jpg, jpeg, png, webp or ppm) among its files ({kinds})"
                        )
                    if target is not None:
                        offsets.append(image[0])
                        sizes.append(image[1])
                        classes.append(target)
        except OSError as error:
            raise InputRejected(f"{shard}: {error}") from error
        except OverflowError as error:
            raise InputRejected(f"{shard}: sample {key}: its class or the size of its image is out of range") from error
        return stamp, offsets, sizes, classes


def shards_of(folder: Path, split: str) -> tuple[list[Path], str]:
    """Return the shards of ``split`` that are in ``folder``, and the ``.json`` field of their classes (empty: ``.cls`` files).

    As timm reads them, by ``_info.json`` or ``info.json``; without either, ``*.tar`` files with the split's name as a word of
    their own (``imagenet-train-0001.tar``), or in a folder of that name. Raises ``InputRejected`` where there are none.
    """
    if not folder.is_dir():
        raise InputRejected(f"{folder} is not a folder on this machine: give the folder of the shards as wds/PATH")
    for name in _INFO_NAMES:
        if (folder / name).is_file():
            return _by_info(folder / name, split)
    # Nothing but a number may follow: in test-train-01.tar the first word is the data set's.
    word = re.compile(rf"(?:.*[-_.])?{re.escape(split)}[-_.0-9of]*\.t[a-z0-9.]+", re.IGNORECASE | re.DOTALL)
    shards = [path for path in _archives(folder) if word.fullmatch(path.name)] or _archives(folder / split)
    if not shards:
        raise InputRejected(
            f"{folder} has no {_INFO_NAMES[0]}, and no shard is named like {split}-0000.tar or {split}/0000.tar"
        )
    return shards, ""


def _by_info(path: Path, split: str) -> tuple[list[Path], str]:
    try:
        splits = json.loads(read_bounded(path, _LONGEST["json"], "description of splits"))["splits"]
        if split not in splits:
            raise InputRejected(f"{split} is not among the splits of {path} ({', '.join(map(str, splits))})")
        names, label = splits[split]["filenames"], splits[split].get("alt_label") or ""
        if not isinstance(label, str):
            raise InputRejected(f"{path}: the alt_label of split {split} must be text")
        shards = [path.parent / name for name in names]
        here = [shard for shard in shards if shard.is_file()]  # a few of a large data set's shards will do, as for timm
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputRejected(f"{path}: cannot be read as a description of splits ({type(error).__name__}: {error})") from error
    if not here:
        raise InputRejected(f"{path} names {len(shards)} shard(s), and none of them is here")
    return here, label


def _archives(folder: Path) -> list[Path]:
    """The tar files of ``folder``, packed ones too: those are refused by name rather than passed over."""
    wanted = re.compile(r".*\.(tar(\.\w+)?|t(gz|bz2?|xz|zst))", re.IGNORECASE | re.DOTALL)
    return [path for path in folder.glob("*") if wanted.fullmatch(path.name) and path.is_file()]


def _members(shard: str, file: IO[bytes]) -> Iterator[tuple[str, str, _Place]]:
    """Each sample file's key, suffix and place, in order; the contents are passed over."""
    if _COMPRESSED_NAME.search(shard) or file.read(8).startswith(_COMPRESSED_START):
        raise InputRejected(f"{shard}: a compressed tar has no random access: unpack it to a plain .tar")
    try:
        for name, place in regular_files(file):
            divided = None if _META.match(name) else _NAME.fullmatch(name)
            if divided is not None:
                yield divided[1], divided[2].lower(), place
    except ValueError as error:
        raise InputRejected(f"{shard}: cannot be read as a tar file: {error}") from error


def _samples(shard: str, file: IO[bytes]) -> Iterator[tuple[str, dict[str, _Place]]]:
    """Each sample's key and the places of its files by suffix."""
    current, parts = "", dict[str, _Place]()
    for key, suffix, place in _members(shard, file):
        if key != current and parts:
            yield current, parts
            parts = {}
        if suffix in parts:
            raise InputRejected(f"{shard}: sample {key}: has two .{suffix} files")
        current, parts[suffix] = key, place
    if parts:
        yield current, parts


def _class_of(where: str, parts: dict[str, _Place], file: IO[bytes], label: str) -> int | None:
    """A sample's class; None where its ``.json`` says that it has none."""
    suffix = "json" if label else "cls"
    if suffix not in parts:
        raise InputRejected(f"{where}: has no .{suffix} file that gives its class")
    offset, size = parts[suffix]
    if size > _LONGEST[suffix]:
        raise InputRejected(f"{where}: its .{suffix} file has {size} bytes; at most {_LONGEST[suffix]} are read for a class")
    file.seek(offset)
    content = file.read(size)
    if not label:
        try:
            return int(content)
        except ValueError as error:
            raise InputRejected(f"{where}: its .cls is not an integer: {content[:20]!r}") from error
    try:
        value: Any = json.loads(content)
        if label in value:
            value = value[label]
        else:  # timm's paths into nested fields
            for step in label.split("/"):
                value = value[step]
        target = int(value)
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError) as error:
        raise InputRejected(f"{where}: its .json has no integer {label!r}") from error
    return target if target >= 0 else None


def _stamp(file: IO[bytes]) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def _joined(parts: list[array[int]], kind: Any) -> np.ndarray:
    return np.concatenate([np.frombuffer(part, dtype=kind) for part in parts] or [np.empty(0, kind)])

"""Opens every data set by one form of address, and says which of its images calibrate and which are evaluated on.

    digits | DIR | FILE.tar | hfds/NAME | wds/PATH_WITHOUT_SPLIT

A folder with ``train`` and ``val``, ``validation`` or ``test`` inside has splits, and so have a hub data set and a folder of
WebDataset shards, which may be of any size: images are read one at a time, by index, and never held. Any other folder or file
is divided once and for good: a fifth of its images, drawn by a fixed permutation, calibrates, and the others are evaluated on.

Classes are known by name: an image's class is the place of its folder's name among the classes given, else among those of the
training split. ``patchslim.images`` decides which files are images, and how they are decoded.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from patchslim.errors import InputRejected, Unavailable
from patchslim.files import open_regular
from patchslim.images import ClassFolders, read_image, scan_class_folders
from patchslim.packages import install_command
from slimming.data.classes import check_utf8, target_map
from slimming.data.digits import CLASSES, DEFAULT_LENGTH, Digits
from slimming.data.shards import ShardReader, shards_of
from slimming.data.tars import TAR_ERRORS, open_tar

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage
    from torch import Tensor

#: Maps a PIL image to a float tensor (3, h, w).
Transform: TypeAlias = "Callable[[PilImage], Tensor]"

CALIBRATION_SHARE = 0.2
_TRAINING_SPLITS = ("train", "training")
_EVALUATION_SPLITS = ("validation", "val", "test")


class Samples(Protocol):
    """A map-style data set: ``samples[i]`` is a PIL image, or what ``transform`` makes of it, and its class."""

    transform: Transform | None

    def __len__(self) -> int:
        """Return how many images there are."""

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        """Return image ``index`` and its class. Raises ``InputRejected`` where it cannot be read."""


@dataclass(frozen=True)
class ImageSet:
    """The images ``indices`` of one opened data set, in that order."""

    address: str
    split: str
    share: str  # "all", or which disjoint share of an undivided data set this is
    labels: list[str]
    samples: Samples
    indices: Sequence[int]  # a range where that says it: a large data set then has no list
    notes: tuple[str, ...] = ()  # what a user is to be told: files left out, classes without images

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def fraction(self) -> float | None:
        """The share of an undivided data set that this is; None where the data set has splits of its own."""
        return None if self.share == "all" else float(self.share.partition("%")[0]) / 100

    @property
    def mirrored_alike(self) -> bool:
        """Whether an image's mirror image is of its class; that of a digit is no digit."""
        return self.address != "digits"

    def describe(self) -> dict[str, object]:
        """Return what a manifest records of it."""
        return {"data": self.address, "split": self.split, "share": self.share, "images": len(self)}


def calibration_set(address: str, count: int, seed: int = 0, *, apart: bool = False, classes: Sequence[str] = ()) -> ImageSet:
    """Return ``count`` images (or all, if there are fewer) to make plans from; ``evaluation_set`` returns none of them.

    ``apart`` says that nothing of this data set is evaluated on, so that one without splits need not be divided.
    ``classes`` are the names of the model's classes, in order; empty: those of the data set. Drawn by ``seed``
    without replacement. Raises ``InputRejected`` or ``Unavailable``.
    """
    opened = _open(address, training=True, limit=count, apart=apart, classes=classes)
    rng = np.random.default_rng([seed, 1])
    pool = opened.indices
    if count >= len(pool):
        return opened
    return replace(opened, indices=[pool[index] for index in sorted(rng.permutation(len(pool))[:count].tolist())])


def evaluation_set(address: str, count: int | None, classes: Sequence[str] = (), *, apart: bool = False) -> ImageSet:
    """Return ``count`` held-out images (None: all), evenly spread, so that few images still cover every class.

    ``classes`` are the names of the model's classes, in order; empty: those of the data set's training split. ``apart`` says
    that no plan is made from this data set, so that one without splits is held out whole. Raises ``InputRejected`` or
    ``Unavailable``.
    """
    opened = _open(address, training=False, limit=count, apart=apart, classes=classes)
    indices = opened.indices
    if count is not None and count < len(indices):
        if address == "digits":
            indices = indices[:count]
        else:
            indices = [indices[position * len(indices) // count] for position in range(count)]
    return replace(opened, indices=indices)


def class_names_of(address: str) -> list[str]:
    """Return the names of a data set's classes, of its training split where it has one; empty where it has only numbers.

    Raises ``InputRejected`` or ``Unavailable``.
    """
    if address == "digits":
        return list(CLASSES)
    if address.partition("/")[0].lower() == "wds":
        return []
    path = Path(address)
    if path.is_dir():
        train, evaluation = _splits(path)
        return scan_class_folders(train if train and evaluation else path).classes
    try:
        return _open(address, training=True, limit=None, apart=True).labels
    except InputRejected:
        return _open(address, training=False, limit=None).labels


def load_tensors(images: ImageSet, transform: Transform | None, batch_size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of images, float (b, 3, h, w), and classes, int64 (b,), in order; worker processes decode ahead.

    ``transform`` maps a PIL image to a float tensor (3, h, w); None where the samples are such tensors already. Raises
    ``InputRejected`` naming an image that cannot be read.
    """
    import torch

    images.samples.transform = transform
    subset: torch.utils.data.Subset[tuple[Tensor, Tensor]] = torch.utils.data.Subset(
        images.samples,  # type: ignore[arg-type]
        images.indices,
    )
    loader = torch.utils.data.DataLoader(subset, batch_size=batch_size, num_workers=workers_for(len(images), batch_size))
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # a worker wraps whatever the decoder raised; the cause is in its text
            cause = (str(error).strip() or type(error).__name__).splitlines()[-1].rpartition("InputRejected: ")[2]
            raise InputRejected(f"{images.address}: an image cannot be read: {cause}") from error
        yield batch


def workers_for(images: int, batch_size: int) -> int:
    """Return how many processes decode: 0 for up to four batches, else half of this process's share of the cores, up to 8."""
    share = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return 0 if images <= 4 * batch_size else min(8, max(1, share // 2))


def fingerprint_of(images: ImageSet) -> str:
    """Return the SHA-256 of the images' bytes and classes, in order: the key of what is made from them.

    ``digits`` is a function of split and index, so its code stands for its pixels. Raises ``InputRejected`` where an image
    cannot be opened.
    """
    digest = hashlib.sha256(f"{images.address.partition('/')[0] if images.address == 'digits' else ''}".encode())
    if isinstance(images.samples, Digits):
        digest.update(Path(__file__).with_name("digits.py").read_bytes())
        digest.update(f"{images.split} {images.indices}".encode())
        return digest.hexdigest()
    reader = getattr(images.samples, "reader", None)
    for index in images.indices:
        if reader is not None:
            try:
                stream, target = reader[index]
                with stream:
                    digest.update(stream.read() if hasattr(stream, "read") else np.asarray(stream).tobytes())
            except OSError as error:  # a link to nothing, or no right to read it
                raise InputRejected(f"{reader.filename(index)}: {error}") from error
        else:
            image, target = images.samples[index]
            digest.update(np.asarray(image).tobytes())
        digest.update(str(images.samples.class_of(target) if isinstance(images.samples, _Read) else target).encode())
    return digest.hexdigest()


def _open(address: str, *, training: bool, limit: int | None, apart: bool = False, classes: Sequence[str] = ()) -> ImageSet:
    opened = _unnamed(address, training=training, limit=limit, apart=apart)
    notes, samples = opened.notes, opened.samples
    if not classes and opened.split in _EVALUATION_SPLITS and Path(address).is_dir():
        classes = class_names_of(address)
    if not classes or not opened.labels:
        return replace(opened, labels=list(classes) or opened.labels)
    where = f"{address}/{opened.split}" if opened.split != "none" else address
    targets, note = target_map(opened.labels, classes, where)
    if targets is not None:
        if not isinstance(samples, _Read):
            raise InputRejected(f"{address}: its classes have an order of their own, which --class-map cannot change")
        samples.targets = targets
    return replace(opened, labels=list(classes), notes=(*notes, *([note] if note else [])))


def _splits(folder: Path) -> tuple[Path | None, Path | None]:
    """The folders of the training and of the evaluation split; None where there is none."""
    found = ([folder / name for name in names if (folder / name).is_dir()] for names in (_TRAINING_SPLITS, _EVALUATION_SPLITS))
    train, evaluation = (next(iter(each), None) for each in found)
    return train, evaluation


def _unnamed(address: str, *, training: bool, limit: int | None, apart: bool) -> ImageSet:
    if address == "digits":
        split = "train" if training else "test"
        samples: Samples = Digits(split, max(limit or 0, DEFAULT_LENGTH[split]))
        return ImageSet(address, split, "all", list(CLASSES), samples, list(range(len(samples))))
    prefix = address.partition("/")[0].lower()
    if prefix == "wds":
        return _open_shards(address, training=training)
    if prefix in ("hfds", "hfids", "tfds", "torch"):
        return _open_named(address, training=training)
    path = Path(address)
    if not path.exists():
        raise InputRejected(f"{address}: no such data; --data takes digits, a folder, FILE.tar, hfds/NAME or wds/PATH")
    if path.is_dir():
        train, evaluation = _splits(path)
        if train and evaluation:
            chosen = train if training else evaluation
            samples, notes = _with_reader(chosen)
            return ImageSet(address, chosen.name, "all", _labels(samples), samples, list(range(len(samples))), notes)
    samples, notes = _with_reader(path)
    if apart:
        return ImageSet(address, "none", "all", _labels(samples), samples, list(range(len(samples))), notes)
    shuffled = np.random.default_rng(20221).permutation(len(samples))
    cut = max(1, round(len(samples) * CALIBRATION_SHARE))
    indices = sorted((shuffled[:cut] if training else shuffled[cut:]).tolist())
    share = f"{CALIBRATION_SHARE if training else 1 - CALIBRATION_SHARE:.0%}, disjoint"
    if not indices:
        raise InputRejected(
            f"{address}: has {len(samples)} image(s), too few for both calibration and evaluation: give 2 or more"
        )
    return ImageSet(address, "none", share, _labels(samples), samples, indices, notes)


def _with_reader(path: Path) -> tuple[Samples, tuple[str, ...]]:
    """The images of a folder or a tar file of class folders, and what is to be said of it."""
    if path.is_dir():
        folders = scan_class_folders(path)
        if not folders.images:
            raise InputRejected(f"{path}: cannot be read as class folders of images: holds none; {folders.described()}")
        return _Read(_FolderReader(folders)), (folders.described(),) if folders.described() else ()
    try:
        reader, note = open_tar(path)
    except TAR_ERRORS as error:
        raise InputRejected(f"{path}: cannot be read as class folders of images: {error}") from error
    samples = _Read(reader)
    if not len(samples):
        raise InputRejected(f"{path}: holds no images in class folders")
    check_utf8(_labels(samples), str(path))
    return samples, (note,) if note else ()


class _FolderReader:
    """The images of class folders, made like timm's readers: ``reader[i]`` is an open file and its class."""

    def __init__(self, folders: ClassFolders) -> None:
        self.class_to_idx = {name: place for place, name in enumerate(folders.classes)}
        self._images = [(str(path), self.class_to_idx[name]) for path, name in folders.images]

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[IO[bytes], int]:
        path, target = self._images[index]
        return open_regular(Path(path)), target

    def filename(self, index: int) -> str:
        return self._images[index][0]


def _open_shards(address: str, *, training: bool) -> ImageSet:
    """The first split that is here, and no other in its stead where it is damaged."""
    folder, reasons = Path(address.partition("/")[2]), []
    for split in ("train",) if training else _EVALUATION_SPLITS:
        try:
            shards, label = shards_of(folder, split)
        except InputRejected as error:
            reasons.append(f"{split}: {error}")
            continue
        samples = _Read(ShardReader(shards, label))
        if len(samples):
            return ImageSet(address, split, "all", [], samples, range(len(samples)))
        reasons.append(f"{split}: has no images")
    raise _no_split(address, reasons)


def _open_named(address: str, *, training: bool) -> ImageSet:
    """A data set of timm's named readers; offline, from what is on this machine."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from timm.data import create_dataset

    reasons = []
    for split in ("train",) if training else _EVALUATION_SPLITS:
        try:
            samples = create_dataset(address, root=None, split=split)
            samples = _Read(samples.reader) if hasattr(samples, "reader") else samples
        except ImportError as error:
            raise Unavailable(f"{address}: {error}; install the readers: {install_command('readers')}") from error
        except Exception as error:
            reasons.append(f"{split}: {str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__}")
            continue
        if len(samples):
            return ImageSet(address, split, "all", _labels(samples), samples, list(range(len(samples))))
        reasons.append(f"{split}: has no images")
    raise _no_split(address, reasons)


def _no_split(address: str, reasons: list[str]) -> InputRejected:
    return InputRejected(f"{address}: no split of it can be used here, offline ({'; '.join(reasons)})")


class _Read:
    """The images of one of timm's readers. Unlike timm's data set, it refuses a damaged image rather than take the next one."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader
        self.transform: Transform | None = None
        self.targets: Sequence[int] | None = None  # the class of each of the reader's; None: the same
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"reader": _unopened(self.reader)}

    def __len__(self) -> int:
        return len(self.reader)

    def class_of(self, target: int) -> int:
        """The model's class for a class of the reader's."""
        return int(target) if self.targets is None else self.targets[int(target)]

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if self._process != os.getpid():  # a forked worker
            self.reader, self._process = _unopened(self.reader), os.getpid()
        try:
            stream, target = self.reader[index]
            image = read_image(stream)
        except Exception as error:
            raise InputRejected(f"{self.reader.filename(index)}: {error}") from error
        return (image if self.transform is None else self.transform(image)), self.class_of(target)


def _unopened(reader: Any) -> Any:
    """A reader of timm's without the tar files that it holds open: processes that share one move each other's place in it."""
    from timm.data.readers.reader_image_in_tar import TarState

    def again(state: Any) -> Any:
        fresh = TarState(ti=state.ti)
        fresh.children = {name: again(child) for name, child in state.children.items()}
        return fresh

    state = getattr(reader, "tar_state", None)
    if state is None:
        return reader
    unopened = copy.copy(reader)
    unopened.tar_state = again(state) if isinstance(state, TarState) else {name: again(each) for name, each in state.items()}
    return unopened


def _labels(samples: Samples) -> list[str]:
    reader = getattr(samples, "reader", None)
    mapping = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    if mapping:
        return [str(name) for name, _ in sorted(mapping.items(), key=lambda item: item[1])]
    features = getattr(getattr(reader, "dataset", None), "features", None)
    if features and "label" in features and getattr(features["label"], "names", None):
        return list(features["label"].names)
    return []

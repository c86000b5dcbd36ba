"""Class folders of images in a tar file, or in tar files in it, by the rules of ``patchslim.images``; read by timm's reader.

As in a folder on the disk, hidden files (macOS puts one beside each) are passed over, files that are no images are counted, a
class of which all files are left out is refused, and images outside any class are left out where there are classes.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from patchslim.errors import InputRejected
from patchslim.images import IMAGE_SUFFIXES, ClassFolders, natural_key

#: Why a tar file cannot be read.
TAR_ERRORS = (RuntimeError, AssertionError, OSError, tarfile.TarError, ValueError, IndexError)


@dataclass
class _Folder:
    """What lies in one folder of a tar file, by suffix; hidden files are not counted."""

    images: int = 0
    others: Counter[str] = field(default_factory=Counter)


def open_tar(path: Path) -> tuple[Any, str]:
    """timm's reader of the images in a tar file, and what is to be said of it ("" for nothing).

    Raises ``InputRejected`` for a class of which all files are left out, or any of ``TAR_ERRORS``.
    """
    from timm.data.readers import create_reader, get_img_extensions, set_img_extensions

    others = get_img_extensions()
    try:
        set_img_extensions(IMAGE_SUFFIXES)
        reader = create_reader("", root=str(path))
    finally:
        set_img_extensions(others)
    with tarfile.open(path, "r:") as tar:
        left_out = _left_out(path, dict(_folders(tar, "")))
    outside = _keep_classes(reader)
    left_out.update(outside)
    return reader, ClassFolders(path, [], dict(left_out), []).described()


def _folders(tar: tarfile.TarFile, above: str) -> Iterator[tuple[str, _Folder]]:
    """Each folder that holds files, by its path; a tar file within is a folder too, as timm has it, one level deep."""
    found: dict[str, _Folder] = {}
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # they would hold every header that was read
        if not member.isfile() or _hidden(member.path):
            continue
        folder, name = os.path.split(member.path)
        stem, suffix = os.path.splitext(name)
        if suffix.lower() == ".tar" and not above:
            inner = tar.extractfile(member)
            assert inner is not None  # it is a regular file
            with tarfile.open(fileobj=inner, mode="r:") as within:
                yield from _folders(within, stem)
            continue
        place = found.setdefault(_plain(os.path.join(above, folder)), _Folder())
        if suffix.lower() in IMAGE_SUFFIXES:
            place.images += 1
        else:
            place.others[suffix.lower()] += 1
    yield from found.items()


def _left_out(path: Path, folders: dict[str, _Folder]) -> Counter[str]:
    left_out: Counter[str] = Counter()
    for name, folder in folders.items():
        left_out.update(folder.others)
        below = any(other.startswith(f"{name}/") for other in folders)
        if name and folder.others and not folder.images and not below:
            kinds = ", ".join(sorted(suffix or "no suffix" for suffix in folder.others))
            raise InputRejected(
                f"{path}: {name}: none of its {folder.others.total()} file(s) is read ({kinds}): images are "
                f"{', '.join(IMAGE_SUFFIXES)}; convert them, or leave the folder out"
            )
    return left_out


def _keep_classes(reader: Any) -> Counter[str]:
    """Take hidden files out of timm's reader, and images of no class where there are classes; returns those, by suffix."""
    members = [member.path for member, _, _ in reader.samples]
    inside = ["" if tar is None else os.path.splitext(os.path.basename(tar.name))[0] for _, _, tar in reader.samples]
    folders = [_plain(os.path.join(tar, os.path.dirname(member))) for tar, member in zip(inside, members, strict=True)]
    names = [folder.rpartition("/")[2] for folder in folders]
    shown = [not _hidden(member) for member in members]
    classes = any(name for name, seen in zip(names, shown, strict=True) if seen)
    kept = [place for place, (name, seen) in enumerate(zip(names, shown, strict=True)) if seen and (name or not classes)]
    outside = Counter(os.path.splitext(members[place])[1].lower() for place, seen in enumerate(shown) if seen)
    outside.subtract(os.path.splitext(members[place])[1].lower() for place in kept)
    known = sorted({names[place] for place in kept}, key=natural_key)
    reader.class_name_to_idx = {name: index for index, name in enumerate(known)}
    reader.class_idx_to_name = dict(enumerate(known))
    reader.samples = reader.samples[kept]
    reader.targets = np.array([reader.class_name_to_idx[names[place]] for place in kept], dtype=np.int64)
    return +outside


def _plain(folder: str) -> str:
    """A folder's path in an archive without the dots and slashes that some archivers begin with."""
    return "/".join(part for part in folder.split("/") if part not in ("", "."))


def _hidden(member: str) -> bool:
    return any(part.startswith(".") for part in _plain(member).split("/"))

"""Class folders in tar files: read and counted as folders on the disk are."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchslim.errors import InputRejected
from slimming.data.source import calibration_set, class_names_of, evaluation_set


def image(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def write(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def inner(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def contents(address: str) -> dict[str, list[int]]:
    """The red of every image, by class name."""
    images = calibration_set(address, 99, apart=True)
    found: dict[str, list[int]] = {}
    for index in images.indices:
        picture, target = images.samples[index]
        found.setdefault(images.labels[target], []).append(int(np.asarray(picture)[0, 0, 0]))
    return {name: sorted(values) for name, values in found.items()}


@pytest.mark.parametrize("start", ["", "./", "data/"])
def test_what_is_left_out_is_counted_aloud(tmp_path: Path, start: str) -> None:
    files = {
        "a/1.png": image(1),
        "a/2.PNG": image(2),
        "a/3.gif": b"",
        "a/README": b"",
        "b/4.png": image(4),
        "b/deep/c/5.png": image(5),
        "b/deep/6.GIF": b"",
    }
    address = write(tmp_path / "data.tar", {start + name: content for name, content in files.items()})
    images = evaluation_set(address, None, apart=True)
    assert contents(address) == {"a": [1, 2], "b": [4], "c": [5]}
    assert images.labels == class_names_of(address) == ["a", "b", "c"]
    (note,) = images.notes
    assert note.startswith(f"{address}: 3 file(s) left out (1 without a suffix, 2 .gif; read are .bmp, ")


def test_hidden_files_are_passed_over(tmp_path: Path) -> None:
    """What macOS's tar and finder put beside each file would not decode."""
    files = {"a/1.png": image(1), "a/._1.png": b"x", "a/.DS_Store": b"x", ".hidden/2.png": b"x", "b/3.png": image(3)}
    address = write(tmp_path / "data.tar", files)
    assert contents(address) == {"a": [1], "b": [3]}
    assert calibration_set(address, 9, apart=True).notes == ()


def test_images_of_no_class_are_left_out_where_there_are_classes(tmp_path: Path) -> None:
    files = {"0.png": image(9), "./7.png": image(9), "a/1.png": image(1), "b/2.png": image(2)}
    address = write(tmp_path / "data.tar", files)
    assert contents(address) == {"a": [1], "b": [2]}
    assert "2 file(s) left out (2 .png;" in calibration_set(address, 9, apart=True).notes[0]
    assert contents(write(tmp_path / "flat.tar", {"0.png": image(3), "./1.png": image(4)})) == {"": [3, 4]}


def test_tar_files_in_a_tar_file_are_classes(tmp_path: Path) -> None:
    files = {"cats.tar": inner({"./1.png": image(1), "notes.txt": b""}), "dogs.tar": inner({"2.png": image(2)})}
    address = write(tmp_path / "data.tar", files)
    assert contents(address) == {"cats": [1], "dogs": [2]}
    assert "1 file(s) left out (1 .txt;" in calibration_set(address, 9, apart=True).notes[0]


@pytest.mark.parametrize("place", ["b/", "./deep/b/", "nested"])
def test_a_class_of_which_all_is_left_out_is_refused(tmp_path: Path, place: str) -> None:
    files = {"a/1.png": image(1)}
    files |= {"b.tar": inner({"2.gif": b""})} if place == "nested" else {f"{place}2.gif": b"", f"{place}x.heic": b""}
    address = write(tmp_path / "data.tar", files)
    with pytest.raises(InputRejected, match=r"data\.tar: (deep/)?b: none of its \d file\(s\) is read \(\.gif.*convert them"):
        calibration_set(address, 9)

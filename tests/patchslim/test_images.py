"""Which files are images, which class they are of, and how each becomes 8 bits."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchslim.errors import InputRejected
from patchslim.images import IMAGE_SUFFIXES, natural_key, read_image, scan_class_folders

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def save(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(GREY).save(path)
    return path


@pytest.mark.parametrize("suffix", [*IMAGE_SUFFIXES, ".JPG", ".Png"])
def test_every_suffix_is_found_and_read(tmp_path: Path, suffix: str) -> None:
    path = save(tmp_path / "cat" / f"a{suffix}")
    assert scan_class_folders(tmp_path).images == [(path, "cat")]
    found = read_image(path)
    assert (found.mode, found.size) == ("RGB", (8, 8))
    assert np.abs(np.asarray(found).astype(int) - GREY[..., None]).max() <= 12  # jpg and webp lose a little


def test_classes_are_in_natural_order_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    for name in ("class 10", "class 2", "Class 1"):
        save(tmp_path / "train" / name / "a.png")
    for name in ("notes.txt", "b.gif", "c.GIF", ".DS_Store", "README"):
        (tmp_path / "train" / "class 2" / name).touch()
    (tmp_path / "train" / "nobody").mkdir()
    (tmp_path / "train" / ".cache").mkdir()
    (tmp_path / "train" / ".cache" / "x.bin").touch()
    save(tmp_path / "train" / "loose.png")
    found = scan_class_folders(tmp_path / "train")
    assert found.classes == ["Class 1", "class 2", "class 10"]
    assert found.left_out == {".txt": 1, ".gif": 2, "": 1, ".png": 1}
    assert found.empty == ["nobody"]
    assert "5 file(s) left out" in found.described()
    assert "2 .gif" in found.described()
    assert "nobody" in found.described()


def test_the_order_is_timms() -> None:
    from timm.utils.misc import natural_key as of_timm

    names = ["a10b", "a9b", "A9c", "10", "9", "b", "", "x1y2", "x1y10"]
    assert sorted(names, key=natural_key) == sorted(names, key=of_timm)
    assert sorted(["²", "a"], key=natural_key) == ["a", "²"]  # a digit to Python that is no number


def test_nothing_left_out_says_nothing(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    assert scan_class_folders(tmp_path).described() == ""


def test_a_class_of_which_every_file_is_left_out_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "a.heic").touch()
    with pytest.raises(InputRejected, match=r"dog: none of its 1 file\(s\) is read \(\.heic\): images are \.bmp, \.jpeg"):
        scan_class_folders(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_class_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(InputRejected, match="not UTF-8: rename it"):
        scan_class_folders(tmp_path)


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    path = save(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    assert scan_class_folders(tmp_path).images == [(path, "cat")]


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm"])
def test_sixteen_bits_keep_their_high_byte(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(GREY.astype(np.uint16) * 257).save(path)
    assert np.array_equal(np.asarray(read_image(path)), np.repeat(GREY[..., None], 3, axis=2))
    assert np.array_equal(np.asarray(read_image(path, "L")), GREY)


def colours_of_sixteen_bits() -> bytes:
    """A PNG of 2 x 1 pixels with 16 bits for each of three channels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"\0" + struct.pack(">6H", 0x12FF, 0x3400, 0x5680, 0xFFFF, 0, 0x80FF)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_sixteen_bits_keep_their_high_byte_too() -> None:
    found = np.asarray(read_image(io.BytesIO(colours_of_sixteen_bits())))
    assert found.tolist() == [[[0x12, 0x34, 0x56], [0xFF, 0, 0x80]]]


@pytest.mark.parametrize("kind", [np.float32, np.int32])
def test_values_without_a_range_are_refused(tmp_path: Path, kind: type) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(GREY.astype(kind)).save(path)
    with pytest.raises(InputRejected, match=r"a\.tif: a picture of mode [IF] .*save it with 8 or 16 bits"):
        read_image(path)


def test_the_exif_orientation_is_not_applied(tmp_path: Path) -> None:
    image = Image.fromarray(GREY[:4])
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png", "L")), GREY[:4])


def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    for side in (9_500, 60_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        path = tmp_path / "a.png"
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)))
        with pytest.raises(InputRejected, match=r"a\.png: .*(89478485 allowed|decompression bomb)"):
            read_image(path)


def test_files_that_are_no_images(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(InputRejected, match=r"a\.png"):
        read_image(path)
    whole = save(path).read_bytes()
    for content in (b"", b"no image", whole[:50], whole[: len(whole) - 40]):
        path.write_bytes(content)
        with pytest.raises(InputRejected, match=r"^\S*a\.png: (not an image|cannot be decoded)"):
            read_image(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputRejected, match=r"a\.png: is not a regular file"):
        read_image(path)

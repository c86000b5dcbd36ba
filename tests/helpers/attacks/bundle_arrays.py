"""Attacks on the golden arrays and pictures: archives, npy headers and PNG files that are not what they say."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.helpers.attacks.bundles import Change, Damage, add, attack, in_manifest, replaced, seal
from tests.helpers.bundles import PREPROCESSING, SIZE


def arrays_of(bundle: Path) -> dict[str, np.ndarray]:
    with np.load(bundle / "golden.npz") as arrays:
        return dict(arrays)


def in_arrays(change: Change) -> Damage:
    """Change the arrays, any object among them, and seal the bundle."""

    def damage(bundle: Path) -> None:
        arrays: dict[str, Any] = arrays_of(bundle)
        change(arrays)
        with (bundle / "golden.npz").open("wb") as file:
            np.savez(file, **arrays)
        seal(bundle)

    return damage


ARRAYS: tuple[tuple[str, Change, str], ...] = (
    ("an array too few", lambda a: a.pop("labels"), "must hold the arrays"),
    ("an array too many", lambda a: a.update(extra=np.zeros(1)), "must hold the arrays"),
    ("one channel", lambda a: a.update(inputs=a["inputs"][:, :1]), "inputs: has shape"),
    ("fewer classes", lambda a: a.update(slim_logits=a["slim_logits"][:, :2]), "slim_logits: has shape"),
    ("fewer labels", lambda a: a.update(labels=a["labels"][:3]), "different numbers of images"),
    ("labels of no class", lambda a: a.update(labels=a["labels"] + 90), "labels must be in"),
    ("labels below -1", lambda a: a.update(labels=a["labels"] - 9), "labels must be in"),
    ("pickled labels", lambda a: a.update(labels=a["labels"].astype(object)), "labels: is object"),
    ("doubles", lambda a: a.update(inputs=a["inputs"].astype(np.float64)), "inputs: is float64"),
    ("big-endian numbers", lambda a: a.update(inputs=a["inputs"].astype(">f4")), "inputs: is >f4"),
    ("Fortran's order", lambda a: a.update(slim_logits=np.asfortranarray(a["slim_logits"])), "Fortran order"),
    ("no image", lambda a: a.update({k: v[:0] for k, v in a.items()}), "has shape (0"),
    ("NaN", lambda a: a.update(slim_logits=a["slim_logits"] * np.nan), "slim_logits holds NaN"),
    ("endless pixels", lambda a: a.update(inputs=a["inputs"] + np.inf), "inputs holds NaN or infinite"),
    ("300 images", lambda a: a.update({k: np.repeat(v, 30, axis=0) for k, v in a.items()}), "more than the"),
    (
        "other answers than the figures",
        lambda a: a.update(slim_logits=np.roll(a["slim_logits"], 1, axis=1)),
        "parity.json: rungs: pytorch-slim: agreeing: 10 of 10 images, and golden.npz alone shows",
    ),
)
for _name, _change, _word in ARRAYS:
    add(f"golden arrays with {_name}", 3, (_word,), in_arrays(_change))
for _data in (b"", b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 50, b"PK\x05\x06" + b"\xff" * 18, b"\0" * 10_000):
    add(f"golden arrays that are {_data[:6]!r} of {len(_data)} bytes", 3, ("golden.npz",), replaced("golden.npz", _data))


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def in_archive(change: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> Damage:
    """Change the npy files of the archive, and seal the bundle."""

    def damage(bundle: Path) -> None:
        members = {f"{name}.npy": npy(array) for name, array in arrays_of(bundle).items()}
        change(members)
        with zipfile.ZipFile(bundle / "golden.npz", "w", compression) as archive:
            for name, data in members.items():
                archive.writestr(name, data)
        seal(bundle)

    return damage


def huge_header() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3, SIZE, SIZE)})
    return buffer.getvalue()


add(
    "a zip bomb of 50 MiB",
    3,
    ("golden.npz", "inputs: its data is not"),
    in_archive(
        lambda members: members.update({"inputs.npy": members["inputs.npy"] + b"\0" * (50 << 20)}), zipfile.ZIP_DEFLATED
    ),
)
add(
    "a header that asks for terabytes",
    3,
    ("golden.npz", "allowed"),
    in_archive(lambda members: members.update(dict.fromkeys(members, huge_header()))),
)
add(
    "an archive of 2000 entries",
    3,
    ("golden.npz", "directory has"),
    in_archive(lambda members: members.update({f"{number}.npy": b"" for number in range(2000)})),
)
add(
    "a path out of the archive",
    3,
    ("must hold the arrays",),
    in_archive(lambda members: members.update({"../../labels.npy": members.pop("labels.npy")})),
)
HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10, 6), }"
for _header in (
    b"",
    b"{",
    b"[" * 3000,
    b"\xff" * 40,
    b"{'descr': '<f4'}",
    HEADER.replace(b"(10, 6)", b"(-1, 6)"),
    HEADER.replace(b"(10, 6)", b"(10.0, 6)"),
    HEADER.replace(b"(10, 6)", b"10"),
    HEADER.replace(b"(10, 6)", b"(1" + b"0" * 500 + b", 6)"),
    HEADER.replace(b"10, 6", b"True, 6"),
    HEADER.replace(b"'<f4'", b"[('a', '<f4')] * 9"),
    HEADER.replace(b"'<f4'", b"'|O'"),
    HEADER.replace(b"'<f4'", b"('<f4', (3,))"),
    HEADER.replace(b"'<f4'", b"{}"),
    HEADER.replace(b"'<f4'", b"'<f4\\x00'"),
    HEADER + b" " * 60_000,
):
    _data = b"\x93NUMPY\x01\x00" + len(_header).to_bytes(2, "little") + _header + bytes(240)
    add(
        f"an npy header {_header[:70]!r} of {len(_header)} bytes",  # numpy's parser raises what Python's does
        3,
        ("golden.npz",),
        in_archive(lambda members, data=_data: members.update({"slim_logits.npy": data})),  # type: ignore[misc]
    )
for _version in (2, 3, 9):
    _data = b"\x93NUMPY" + bytes([_version, 0]) + bytes(300)
    add(
        f"an npy file of format {_version}",
        3,
        ("golden.npz", "npy format"),
        in_archive(lambda members, data=_data: members.update({"labels.npy": data})),  # type: ignore[misc]
    )


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of these chunks, each a kind and its data."""
    parts = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def ihdr(width: int, height: int, bits: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def in_picture(change: Callable[[bytes], bytes]) -> Damage:
    """Change the first picture's file, and seal the bundle."""

    def damage(bundle: Path) -> None:
        path = bundle / "golden" / "0.png"
        path.write_bytes(change(path.read_bytes()))
        seal(bundle)

    return damage


def saved(data: bytes, mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(data)).convert(mode).save(buffer, format=kind)
    return buffer.getvalue()


def other(data: bytes) -> bytes:
    """The picture with one bit of one pixel changed."""
    pixels = np.array(Image.open(io.BytesIO(data)))
    pixels[6, 5, 1] ^= 32
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


_ZEROS = (b"IDAT", zlib.compress(bytes(9)))
PICTURES: tuple[tuple[str, Callable[[bytes], bytes], str], ...] = (
    ("of other pixels", other, "does not make row 0 of golden.npz of it: "),
    ("in another format", lambda data: saved(data, kind="BMP"), "is no PNG file"),
    ("without bytes", lambda data: b"", "is no PNG file"),
    ("cut off", lambda data: data[:-30], "cannot be preprocessed"),
    ("with a wrong checksum", lambda data: data[:40] + b"x" + data[41:], "cannot be preprocessed"),
    ("with transparency", lambda data: saved(data, "RGBA"), "no PNG file of 8 bits per channel in RGB"),
    ("in grey", lambda data: saved(data, "L"), "no PNG file of 8 bits per channel in RGB"),
    ("with a palette", lambda data: saved(data, "P"), "no PNG file of 8 bits per channel in RGB"),
    ("without width", lambda data: png(ihdr(0, 5)), "0 x 5 pixels"),
    ("of 900 million pixels", lambda data: png(ihdr(30_000, 30_000), _ZEROS), "more than 134217728 pixels together"),
    ("as thin as a hair", lambda data: png(ihdr(1, 40_000), _ZEROS), "cannot be preprocessed"),
    ("of two sizes", lambda data: png(ihdr(1, 1), ihdr(2, 2), (b"IDAT", zlib.compress(bytes(14)))), "its size twice"),
)
for _name, _make, _word in PICTURES:
    add(f"a picture {_name}", 3, ("golden/0.png", _word), in_picture(_make))


def rule(**changes: Any) -> Damage:
    """State other preprocessing, and the rule that follows from it."""
    record = PREPROCESSING.model_copy(update=changes).with_rule().model_dump(mode="json")
    return in_manifest(lambda manifest: manifest.update(preprocessing=record))


add("another filter", 3, ("golden/0.png", "values differ, by at most"), rule(interpolation="bilinear"))
add("another mean of one colour", 3, ("golden/0.png", "64 of 192 values differ"), rule(mean=[0.5, 0.5, 0.50001]))
add("another crop", 3, ("golden/0.png", "values differ"), rule(crop_pct=0.5))


@attack(3, "golden/0.png", "does not make row 1")
def pictures_exchanged(bundle: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        first, second, _ = manifest["golden_images"]
        first["row"], second["row"] = 1, 0

    in_manifest(change)(bundle)


add(
    "a picture of no row",
    3,
    ("golden/2.png: is of row 10, and golden.npz has 10",),
    in_manifest(lambda manifest: manifest["golden_images"][2].update(row=10)),
)

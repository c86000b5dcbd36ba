"""The pictures beside the golden inputs: what the rule makes of them is what is stored, or the bundle is refused by name."""

from __future__ import annotations

import io
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers.bundles import PREPROCESSING, make_bundle, refused, reseal
from validate import check_bundle, load_manifest
from validate.images import preprocess
from validate.manifest import GoldenImage

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("good") / "bundle")


@pytest.fixture
def bundle(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "bundle"))


def test_pictures_give_their_tensors(good: Path) -> None:
    (found,) = [check for check in check_bundle(good, threads=1).checks if check.name == "preprocessing"]
    assert (found.status, found.detail) == ("passed", "the rule makes the golden inputs of 3 pictures, bit for bit")


def test_a_bundle_of_before(bundle: Path) -> None:
    """It has neither pictures nor a rule: valid, and what was not checked is said."""
    shutil.rmtree(bundle / "golden")
    reseal(bundle, golden_images=[], preprocessing=PREPROCESSING.model_copy(update={"rule": None}))
    verdict = check_bundle(bundle, threads=1)
    assert verdict.passed
    (found,) = [check for check in verdict.checks if check.name == "preprocessing"]
    assert found.status == "not executed"
    assert "holds no pictures" in found.detail


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    parts = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def header(width: int, height: int, bits: int = 8, colour: int = 2) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)


def saved(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind)
    return buffer.getvalue()


def darker(data: bytes) -> bytes:
    """The picture with one bit changed."""
    pixels = np.array(Image.open(io.BytesIO(data)))
    pixels[6, 5, 1] ^= 32
    return saved(Image.fromarray(pixels))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (darker, r"0\.png: preprocessing\.rule in manifest\.json does not make row 0 of golden\.npz of it: \d+ of 192 values"),
        (lambda data: saved(Image.open(io.BytesIO(data)), "BMP"), "is no PNG file"),
        (lambda data: b"", "is no PNG file"),
        (lambda data: data[:-30], "cannot be preprocessed"),
        (lambda data: data[:40] + b"x" + data[41:], "cannot be preprocessed"),
        (lambda data: saved(Image.open(io.BytesIO(data)).convert("RGBA")), "no PNG file of 8 bits per channel in RGB"),
        (lambda data: saved(Image.open(io.BytesIO(data)).convert("L")), "no PNG file of 8 bits per channel in RGB"),
        (lambda data: png(header(0, 5)), "0 x 5 pixels"),
        (lambda data: png(header(30_000, 30_000), (b"IDAT", zlib.compress(bytes(9)))), "more than 134217728 pixels together"),
        (lambda data: png(header(1, 40_000), (b"IDAT", zlib.compress(bytes(9)))), "cannot be preprocessed"),
        (
            lambda data: png(header(1, 1), header(2, 2), (b"IDAT", zlib.compress(bytes(14))), (b"IEND", b"")),
            "states its size twice",
        ),
    ],
)
def test_pictures_that_are_not_those(bundle: Path, change: Callable[[bytes], bytes], fault: str) -> None:
    path = bundle / "golden" / "0.png"
    path.write_bytes(change(path.read_bytes()))
    reseal(bundle)
    verdict = check_bundle(bundle, threads=1)
    assert verdict.exit_code == 3
    assert re.search(fault, verdict.faults[0])
    assert "0.png" in verdict.faults[0]


def test_a_rule_that_does_not_make_the_tensors(bundle: Path) -> None:
    other = PREPROCESSING.model_copy(update={"interpolation": "bilinear"}).with_rule()
    reseal(bundle, preprocessing=other)
    refused(bundle, 3, "golden/0.png", "values differ, by at most")
    reseal(bundle, preprocessing=PREPROCESSING.model_copy(update={"mean": [0.5, 0.5, 0.50001]}).with_rule())
    refused(bundle, 3, "64 of 192 values differ")


def test_pictures_of_other_rows(bundle: Path) -> None:
    first, second, third = load_manifest(bundle).golden_images
    swapped = [GoldenImage(path=first.path, row=1), GoldenImage(path=second.path, row=0), third]
    reseal(bundle, golden_images=swapped)
    refused(bundle, 3, "golden/0.png", "does not make row 1")
    reseal(bundle, golden_images=[first, second, GoldenImage(path=third.path, row=10)])
    refused(bundle, 3, "golden/2.png: is of row 10, and golden.npz has 10")


def test_the_program_of_the_docs(good: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "edge.md").read_text(encoding="utf-8")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL) if "golden_images" in code]
    program = code.replace("bundles/vit_ti-trt", str(good))
    exec(program, {"preprocess": lambda image: preprocess(image, PREPROCESSING)})
    told = capsys.readouterr().out.splitlines()
    assert told == [f"golden/{row}.png 0.0" for row in range(3)]

"""Golden arrays and ONNX files of a bundle that was sealed over them again: their content decides, not their digest."""

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchslim.errors import ParityFailed
from tests.helpers.bundles import CLASSES, IMAGES, SIZE, make_bundle, refused, reseal, weight, write_onnx
from validate import check_bundle, load_manifest
from validate.golden import Golden, read_golden, write_golden
from validate.manifest import OnnxRecord, TensorSpec


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def golden_arrays(bundle: Path) -> dict[str, np.ndarray]:
    with np.load(bundle / "golden.npz") as arrays:
        return dict(arrays)


def npz(path: Path, arrays: dict[str, Any]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda a: a.pop("labels"), "must hold the arrays"),
        (lambda a: a.update(extra=np.zeros(1)), "must hold the arrays"),
        (lambda a: a.update(inputs=a["inputs"][:, :1]), "inputs: has shape"),
        (lambda a: a.update(slim_logits=a["slim_logits"][:, :2]), "slim_logits: has shape"),
        (lambda a: a.update(labels=a["labels"][:3]), "different numbers of images"),
        (lambda a: a.update(labels=a["labels"] + 90), "labels must be in"),
        (lambda a: a.update(labels=a["labels"].astype(object)), "labels: is object"),
        (lambda a: a.update(inputs=a["inputs"].astype(np.float64)), "inputs: is float64"),
        (lambda a: a.update({k: v[:0] for k, v in a.items()}), "has shape (0"),
        (lambda a: a.update(slim_logits=a["slim_logits"] * np.nan), "slim_logits holds NaN"),
    ],
)
def test_golden_arrays_that_do_not_fit(bundle: Path, change: Callable[[dict[str, Any]], Any], word: str) -> None:
    arrays = golden_arrays(bundle)
    change(arrays)
    npz(bundle / "golden.npz", arrays)
    reseal(bundle)
    refused(bundle, 3, "golden.npz", word)


def test_golden_that_is_a_pickle_or_no_zip(bundle: Path) -> None:
    for data in (b"", b"\x80\x04K\x01.", b"PK\x03\x04" + b"\0" * 50):
        (bundle / "golden.npz").write_bytes(data)
        reseal(bundle)
        refused(bundle, 3, "golden.npz")


def test_golden_that_is_a_zip_bomb(bundle: Path) -> None:
    arrays = golden_arrays(bundle)
    with zipfile.ZipFile(bundle / "golden.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            bomb = b"\0" * (50 << 20) if name == "inputs" else b""
            archive.writestr(f"{name}.npy", buffer.getvalue() + bomb)
    reseal(bundle)
    refused(bundle, 3, "golden.npz", "inputs: its data is not")
    huge = io.BytesIO()
    np.lib.format.write_array_header_1_0(huge, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40, 3, SIZE, SIZE)})
    with zipfile.ZipFile(bundle / "golden.npz", "w") as archive:
        for name in arrays:
            archive.writestr(f"{name}.npy", huge.getvalue())
    reseal(bundle)
    refused(bundle, 3, "golden.npz", "allowed")


def test_golden_comes_back_as_it_went(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    golden = Golden(
        rng.standard_normal((2, 3, 4, 5)).astype(np.float32)[:, ::-1],
        np.array([1, -1]),
        rng.standard_normal((7, 2)).astype(np.float32).T,
        rng.standard_normal((2, 7)),
    )
    write_golden(tmp_path / "golden.npz", golden)
    back = read_golden(tmp_path / "golden.npz", (3, 4, 5), 7)
    np.testing.assert_array_equal(back.inputs, golden.inputs)
    np.testing.assert_array_equal(back.original_logits, golden.original_logits)
    np.testing.assert_array_equal(back.labels, golden.labels)


@pytest.mark.parametrize("name", ["model.onnx", "model-fp16.onnx"])
@pytest.mark.parametrize(("data", "word"), [(b"", "empty or truncated"), (b"not onnx at all", "not a readable ONNX file")])
def test_a_sealed_graph_that_is_none(bundle: Path, name: str, data: bytes, word: str) -> None:
    (bundle / name).write_bytes(data)
    reseal(bundle)
    refused(bundle, 3, name, word)


def test_a_sealed_graph_that_is_truncated(bundle: Path) -> None:
    data = (bundle / "model.onnx").read_bytes()
    (bundle / "model.onnx").write_bytes(data[: len(data) - 200])
    reseal(bundle)
    refused(bundle, 3, "model.onnx")


def test_a_graph_with_another_interface(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight()[:, :4])
    reseal(bundle)
    refused(bundle, 3, "model.onnx")
    write_onnx(bundle / "model.onnx", weight(), batch=4)
    reseal(bundle)
    refused(bundle, 3, "model.onnx", "inputs and outputs")


def test_a_graph_of_fixed_batch_size(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (bundle / "model-fp16.onnx").unlink()
    write_onnx(bundle / "model.onnx", weight(), batch=4)
    reseal(
        bundle,
        inputs=[TensorSpec(name="image", dtype="float32", shape=[4, 3, SIZE, SIZE])],
        outputs=[TensorSpec(name="logits", dtype="float32", shape=[4, CLASSES])],
        onnx=[OnnxRecord(path="model.onnx", stage="onnx-slim", max_error=2e-4)],
    )
    assert IMAGES % 4
    assert check_bundle(bundle).exit_code == 0


def test_weights_outside_the_bundle(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight(), external="weights.bin")
    reseal(bundle)
    assert check_bundle(bundle).exit_code == 0
    shutil.copy(bundle / "weights.bin", bundle.parent / "weights.bin")
    for location in ("../weights.bin", str(bundle.parent / "weights.bin")):
        write_onnx(bundle / "model.onnx", weight(), external=location)
        reseal(bundle)
        refused(bundle, 3, "model.onnx", "outside the bundle")
    (bundle / "*").mkdir()
    (bundle / "*" / "_ORT_MEM_ADDR_").write_bytes(bytes(9))
    write_onnx(bundle / "model.onnx", weight(), external="*/_ORT_MEM_ADDR_")
    reseal(bundle)
    refused(bundle, 3, "model.onnx", "an address in memory")
    write_onnx(bundle / "model.onnx", weight(), external="elsewhere.bin")
    reseal(bundle)
    refused(bundle, 3, "model.onnx", "does not list")


def test_wrong_answers_are_exit_5(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight() * np.float32(1.1))
    reseal(bundle)
    refused(bundle, 5, "model.onnx", "max error")
    with pytest.raises(ParityFailed, match="max error"):
        check_bundle(bundle).raise_if_failed()


def test_disagreement_is_exit_5_within_the_tolerance(bundle: Path) -> None:
    """Logits so small that any others are within the tolerance."""
    arrays = golden_arrays(bundle)
    npz(
        bundle / "golden.npz",
        {name: a if a.dtype == np.int64 or a.ndim == 4 else a * np.float32(1e-6) for name, a in arrays.items()},
    )
    write_onnx(bundle / "model.onnx", weight(seed=2) * np.float32(1e-6))
    reseal(bundle)
    refused(bundle, 5, "model.onnx", "agreement")


def test_nan_is_exit_5_of_its_own(bundle: Path) -> None:
    broken = weight()
    broken[0, 0] = np.inf
    write_onnx(bundle / "model.onnx", broken)
    reseal(bundle)
    verdict = check_bundle(bundle)
    assert verdict.exit_code == 5
    assert [check.name for check in verdict.checks if check.status == "failed"] == ["finite"]


def test_a_graph_declared_not_to_run_is_not_run(bundle: Path) -> None:
    records = [load_manifest(bundle).onnx[0], OnnxRecord(path="model-fp16.onnx", stage="onnx-slim-fp16", max_error=None)]
    reseal(bundle, onnx=records)
    verdict = check_bundle(bundle)
    assert verdict.exit_code == 0
    assert [check.subject for check in verdict.checks if check.status == "not executed"] == ["engine", "model-fp16.onnx"]


HEADER = b"{'descr': '<f4', 'fortran_order': False, 'shape': (10, 6), }"


@pytest.mark.parametrize(
    "header",
    [
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
    ],
    ids=range(15),
)
def test_npy_headers_that_are_malformed(bundle: Path, header: bytes) -> None:
    """Each is in the place of ``slim_logits``; numpy's parser raises what Python's does."""
    arrays = golden_arrays(bundle)
    with zipfile.ZipFile(bundle / "golden.npz", "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + array.tobytes()
            archive.writestr(f"{name}.npy", data if name == "slim_logits" else buffer.getvalue())
    reseal(bundle)
    refused(bundle, 3, "golden.npz")


def test_a_zip_archive_of_many_entries(bundle: Path) -> None:
    with zipfile.ZipFile(bundle / "golden.npz", "w") as archive:
        for number in range(2000):
            archive.writestr(f"{number}.npy", b"")
    reseal(bundle)
    refused(bundle, 3, "golden.npz", "directory has")


def test_more_golden_images_than_any_bundle_has(bundle: Path) -> None:
    arrays = {name: np.repeat(array, 30, axis=0) for name, array in golden_arrays(bundle).items()}
    npz(bundle / "golden.npz", arrays)
    reseal(bundle)
    refused(bundle, 3, "golden.npz", "more than the")

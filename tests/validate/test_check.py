"""Golden arrays and ONNX files of a bundle that was sealed over them again: their content decides, not their digest.

What is refused is in the corpus of hostile bundles (tests/helpers/attacks).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from patchslim.errors import ParityFailed
from tests.helpers.bundles import CLASSES, IMAGES, SIZE, make_bundle, reseal, weight, write_onnx
from validate import check_bundle, load_manifest
from validate.golden import Golden, read_golden, write_golden
from validate.manifest import OnnxRecord, TensorSpec


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


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


def test_weights_in_a_file_beside_the_graph(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight(), external="weights.bin")
    reseal(bundle)
    assert check_bundle(bundle).exit_code == 0


def test_wrong_answers_are_exit_5(bundle: Path) -> None:
    write_onnx(bundle / "model.onnx", weight() * np.float32(1.1))
    reseal(bundle)
    with pytest.raises(ParityFailed, match="max error"):
        check_bundle(bundle).raise_if_failed()


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

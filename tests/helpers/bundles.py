"""The small bundle that the tests damage (``benchmarks.fuzz.bundles``), and what a check of it is compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.fuzz.bundles import (
    CLASSES,
    IMAGES,
    PREPROCESSING,
    SIZE,
    make_bundle,
    plan,
    reseal,
    weight,
    write_onnx,
)
from validate import check_bundle

__all__ = [
    "CLASSES",
    "IMAGES",
    "PREPROCESSING",
    "SIZE",
    "Answer",
    "make_bundle",
    "only_for_onnxruntime",
    "plan",
    "refused",
    "reseal",
    "weight",
    "write_onnx",
]


def only_for_onnxruntime(path: Path) -> None:
    """The same classifier by way of an operator of ONNX Runtime's own, which OpenVINO does not know."""
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "product"
    model.graph.node.extend(
        [
            helper.make_node("ExpandDims", ["product", "last"], ["wide"], domain="com.microsoft"),
            helper.make_node("Squeeze", ["wide", "axis"], ["logits"]),
        ]
    )
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.array(2, np.int32), "last"), numpy_helper.from_array(np.array([2]), "axis")]
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, path)


def refused(bundle: Path, code: int, *words: str) -> None:
    """Assert that the check of ``bundle`` ends with exit ``code`` and that its faults say all the ``words``."""
    verdict = check_bundle(bundle)
    assert verdict.exit_code == code, verdict.checks
    for word in words:
        assert word in "; ".join(verdict.faults)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a run of ``python -m validate.run`` gave."""

    code: int
    out: str
    err: str

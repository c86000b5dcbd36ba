"""What a report's figures prove: what an export may grant, intervals, and how many images a gate needs.

Forged figures are in the corpus of hostile bundles (tests/helpers/attacks).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.helpers.bundles import make_bundle, reseal
from validate import check_bundle, load_manifest
from validate.explain import what_it_proves
from validate.parity import rung


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return make_bundle(tmp_path / "bundle")


def test_what_fp16_may_be_granted(bundle: Path) -> None:
    first, second = load_manifest(bundle).onnx
    reseal(bundle, onnx=[first, second.model_copy(update={"max_error": 0.1, "min_agreement": 90.0})])  # as until now
    assert check_bundle(bundle).passed


def test_what_a_verdict_rests_on() -> None:
    logits = np.eye(4, dtype=np.float32)[np.arange(8) % 4]
    turned = np.roll(logits, 1, axis=1)
    targets = np.arange(8) % 4
    many = np.arange(2000) % 4
    original = rung("pytorch", logits, targets)
    one = rung("pytorch-slim", logits[:1], targets[:1], logits[:1])
    assert (
        "one image of 1 is 100 points and decides this gate alone: it proves nothing" in what_it_proves([original, one], 0.2)[1]
    )
    whole = np.eye(4, dtype=np.float32)[many]
    said = what_it_proves([rung("pytorch", whole, many), rung("pytorch-slim", whole, many, whole)], 0.2)
    assert said == ["gate: at most 0.2 points of top-1 lost; pytorch-slim lost 0.00 on 2000 images, 95 % CI -0.10 to 0.10"]
    said = what_it_proves([rung("pytorch", whole[:800], many[:800]), rung("a", whole[:800], many[:800], whole[:800])], 0.2)
    assert said[1] == "800 images cannot tell this from a drop above the gate; about 980 could"
    unlabelled = rung("pytorch-slim", turned, None, logits)
    assert "pytorch-slim lost 100.00 on 8 images" in what_it_proves([original, unlabelled], 0.0)[0]
    assert "no number of images resolves 0 points" in what_it_proves([original, unlabelled], 0.0)[1]
    assert what_it_proves([original], 0.2)[0].endswith("no stage after the original was run")

"""What the closing table says beside the numbers: a latency that was asked, what a file holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from export.summary import as_json, latency_text
from validate.manifest import LatencyRecord

if TYPE_CHECKING:
    from export.pipeline import Outcome


def test_json_says_the_same(ort_export: Outcome) -> None:
    printed = as_json(ort_export)
    assert printed["gate"]["max_top1_drop"] == 100
    assert printed["gate"]["proves"][0].startswith("gate: at most 100 points of top-1 lost")
    assert printed["dense_onnx_holds"] == "the refitted weights, uncut"
    assert printed["latency"] is None


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (
            {"criterion": "latency-reduction", "asked": 0.3, "measured_on": "here", "dense_ms": 10.0, "measured_ms": 6.9},
            "asked 30.0% less, table promised 6.5 of 10 ms, 35.0% less, measured 6.9 of 10 ms, 31.0% less; "
            "batches of 8 on here",
        ),
        (
            {"criterion": "latency-budget-ms", "asked": 6.0, "measured_on": "here", "dense_ms": 10.0, "measured_ms": 6.9},
            "asked 6 ms, table promised 6.5 of 10 ms, 35.0% less, measured 6.9 of 10 ms, 31.0% less (more than asked); "
            "batches of 8 on here",
        ),
        (
            {"criterion": "latency-reduction", "asked": 0.3},
            "asked 30.0% less, table promised 6.5 of 10 ms, 35.0% less, not measured: the engine does not run here; "
            "batches of 8 on there",
        ),
    ],
)
def test_a_latency_ends_with_what_was_asked_promised_and_measured(given: dict[str, object], text: str) -> None:
    fixed = {"batch": 8, "device": "there", "table_dense_ms": 10.0, "promised_ms": 6.5}
    assert latency_text(LatencyRecord.model_validate(fixed | given)) == text

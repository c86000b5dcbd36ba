"""Other ways to spend the same MACs: every row is measured, costs what it says, and is not measured twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy.alternatives import AlternativeOptions, Alternatives
from patchslim.errors import InputRejected, UsageError

TINY = ("img_size=48", "patch_size=8", "embed_dim=48", "depth=6", "num_heads=3", "num_classes=10")


def options(output: Path, seed: int = 0) -> AlternativeOptions:
    return AlternativeOptions(
        name="tiny",
        model="vit_tiny_patch16_224",
        model_arg=TINY,
        weights="random",
        eval_images=12,
        calibration_images=64,
        distill_steps=2,
        distill_budgets=(0.4,),
        budgets=(0.4, 0.95),
        merge_blocks=(2,),
        seed=seed,
        output=output,
    )


@pytest.mark.slow
def test_every_row_is_measured_once_and_costs_what_it_says(tmp_path: Path) -> None:
    output = tmp_path / "alternatives.json"
    result = Alternatives(options(output)).measure()
    assert json.loads(output.read_text(encoding="utf-8"))["rows"] == result["rows"]
    rows = {row["row"]: row for row in result["rows"]}
    names = ["resolution", "ramp", "blocks-auto", "blocks-2", "DiffRate", "radial"]
    measured = [[f"{name} {budget}" for name in names] for budget in ("40%", "95%")]
    assert list(rows) == ["dense", *measured[0], "distilled 40%", *measured[1]]
    assert rows["distilled 40%"]["distilled"]["steps"] == 2
    for name in names[1:]:
        assert 0.4 <= rows[f"{name} 40%"]["reduction"] < 0.5
    assert "cannot" in rows["blocks-2 95%"]["refused"]
    assert rows["resolution 40%"]["side"] in (32, 40)
    assert len(set(rows["blocks-2 40%"]["counts"][:-1])) <= 3
    assert rows["radial 40%"]["counts"] == rows["ramp 40%"]["counts"]
    assert rows["dense"]["kl"] == 0
    before = output.stat().st_mtime_ns
    again = Alternatives(options(output)).measure()
    assert again["rows"] == result["rows"]
    assert output.stat().st_mtime_ns != before  # written again, whole
    output.write_text(output.read_text(encoding="utf-8").replace(result["model"]["weights_sha256"], "0" * 64))
    with pytest.raises(InputRejected, match="holds results of another model or other images"):
        Alternatives(options(output))


@pytest.mark.slow
def test_some_rows_alone_are_those_of_a_whole_run(tmp_path: Path) -> None:
    some = dataclasses.replace(options(tmp_path / "some.json"), rows=("ramp", "distilled"), distill_precision="bf16")
    result = Alternatives(some).measure()
    assert [row["row"] for row in result["rows"]] == ["dense", "ramp 40%", "distilled 40%", "ramp 95%"]
    assert "--distill-precision bf16" in result["command"]
    assert "--rows ramp distilled" in result["command"]
    assert list(tmp_path.iterdir()) == [some.output]  # no checkpoint stays


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"distill_steps": -1}, "--distill-steps must not be negative"),
        ({"rows": ("ram",)}, "--rows ram: must be ramp, distilled"),
        ({"rows": ("distilled",)}, "--rows distilled goes with --distill-steps"),
    ],
)
def test_what_it_does_not_take(given: dict[str, Any], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        AlternativeOptions(**given).check()

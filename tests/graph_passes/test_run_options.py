"""The options of ``python -m graph_passes.run``: which passes run, what the model takes and gives, how a cut is laid."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from graph_passes import load_model, slim
from graph_passes.pass_manager import default_passes
from graph_passes.run import main
from patchslim.errors import UsageError
from patchslim.plan import SlimPlan
from tests.helpers.onnx_models import dense, ort_logits, plan_for, reference

PLAN = [list(range(0, 17, 2)), [0, 4, 8, 12], [0, 4, 8, 12], [0]]
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def plan() -> SlimPlan:
    return plan_for(dense("plain")[0], PLAN)


@pytest.fixture
def model(tmp_path: Path, plan: SlimPlan) -> Path:
    """A dense model; ``plan.json`` lies beside it."""
    plan.save(tmp_path / "plan.json")
    path = tmp_path / "dense.onnx"
    path.write_bytes(dense("plain")[1].SerializeToString())
    return path


class Door:
    """``graph_passes.run`` on the model of the test; ``code`` and ``error`` are those of the last run."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.model, self.output, self.plan = model, model.parent / "slim.onnx", model.parent / "plan.json"
        self.monkeypatch, self.capsys = monkeypatch, capsys
        self.code, self.error = 0, ""

    def __call__(self, *arguments: object) -> dict[str, Any]:
        self.monkeypatch.setattr(sys, "argv", ["graph_passes.run", *map(str, arguments), "--json"])
        self.code = main()
        out, self.error = self.capsys.readouterr()
        return json.loads(out) if out else {}

    def slim(self, *arguments: object) -> dict[str, Any]:
        """With a plan and an output, after which it must have ended well."""
        report = self(self.model, "--plan", self.plan, "-o", self.output, *arguments)
        assert self.code == 0, self.error
        return report


@pytest.fixture
def door(model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Door:
    return Door(model, monkeypatch, capsys)


def names(report: dict[str, Any]) -> list[str]:
    return [entry["name"] for entry in report["passes"]]


@pytest.mark.parametrize(
    ("form", "absent"),
    [("slice", {"Gather"}), ("gather", {"Slice"}), ("matmul", {"Gather", "Slice"})],
)
def test_a_cut_is_laid_in_the_form_that_was_asked_for(form: str, absent: set[str], door: Door, plan: SlimPlan) -> None:
    report = door.slim("--cut", form, "--passes", "fold_constants", "repair_reshapes", "cut_tokens")
    assert report["cut"] == form
    for name in absent:  # what the exporter left is not the cut's
        assert report["after"]["operators"].get(name, 0) <= report["before"]["operators"].get(name, 0)
    wanted = reference(dense("plain")[0], plan, IMAGES)
    np.testing.assert_allclose(ort_logits(onnx.load(door.output), IMAGES), wanted, atol=1e-4)


@pytest.mark.parametrize("passes", [["fold_constants,cut_last_block"], ["fold_constants", "cut_last_block"]])
def test_passes_that_need_no_plan_run_without_one(passes: list[str], door: Door) -> None:
    report = door(door.model, "-o", door.output, "--passes", *passes)
    assert door.code == 0, door.error
    assert names(report) == ["fold_constants", "cut_last_block"]
    assert [block["computes"] for block in report["after"]["vit"]["blocks"]] == [17, 17, 17, 1]
    assert (report["plan"], report["plan_macs"], report["dense_macs"]) == (None, None, None)
    wanted = ort_logits(dense("plain")[1], IMAGES)
    np.testing.assert_allclose(ort_logits(onnx.load(door.output), IMAGES), wanted, atol=1e-5)


def test_a_pass_that_lacks_its_plan_is_named(door: Door) -> None:
    door(door.model, "-o", door.output, "--passes", "fold_constants", "cut_tokens")
    assert door.code == 2
    assert "and cut_tokens cannot do without" in door.error
    with pytest.raises(UsageError, match="cut_tokens"):
        slim(load_model(door.model), None, passes=["cut_tokens"])


def test_an_optional_pass_is_added_at_its_place(door: Door) -> None:
    report = door.slim("--also", "cut_last_block,drop_patches")
    assert names(report) == default_passes("split", "fp32", also=["cut_last_block", "drop_patches"])
    assert names(report).index("drop_patches") < names(report).index("cut_tokens") < names(report).index("cut_last_block")
    assert report["after"]["vit"]["embedded"] == len(PLAN[0]) < report["before"]["vit"]["embedded"] == 17
    assert report["after"]["vit"]["stem_macs"] < report["before"]["vit"]["stem_macs"]


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--passes", "cut_tokens", "--also", "cut_last_block"], "--also"),
        (["--also", "no_such_pass"], "no pass named no_such_pass"),
        (["--also", "drop_patch"], "did you mean drop_patches"),
        (["--passes", "find_blocks", "--image", "uint8-nhwc"], "image_input"),
        (["--mean", "0.5", "0.5", "0.5"], "image_input"),
        (["--image", "uint8-nchw"], "--mean"),
        (["--passes", "cut_tokens", "--precision", "fp16"], "to_fp16"),
        (["--image-size", "large"], "--image-size large"),
        (["--image-size", "224x"], "--image-size 224x"),
        (["--image-size", "64"], "32"),
        (["--outputs", "features"], "no output 'features'"),
    ],
)
def test_options_that_do_not_go_together_exit_with_2(arguments: list[str], fault: str, door: Door) -> None:
    door(door.model, "--plan", door.plan, "-o", door.output, *arguments)
    assert door.code == 2
    assert fault in door.error
    assert not door.output.exists()


@pytest.mark.parametrize("form", ["uint8-nchw", "uint8-nhwc", "float-nchw-255"])
def test_images_come_as_pixels_and_are_normalised_inside(form: str, door: Door, plan: SlimPlan) -> None:
    mean, std = np.array([0.4, 0.5, 0.6], np.float32), np.array([0.2, 0.3, 0.25], np.float32)
    report = door.slim("--image", form, "--mean", *mean, "--std", *std)
    assert "image_input" in names(report)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    normalised = (pixels / np.float32(255) - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)
    given = torch.from_numpy(pixels.transpose(0, 2, 3, 1).copy() if form == "uint8-nhwc" else pixels)
    given = given.float() if form.startswith("float") else given
    wanted = reference(dense("plain")[0], plan, torch.from_numpy(normalised.astype(np.float32)))
    np.testing.assert_allclose(ort_logits(onnx.load(door.output), given), wanted, atol=1e-3)


def test_outputs_that_are_not_wanted_are_left_out(door: Door) -> None:
    proto = onnx.load(door.model)
    tokens = onnx.helper.make_tensor_value_info("every_token", onnx.TensorProto.FLOAT, ["batch", 17, 48])
    last = next(node for node in reversed(proto.graph.node) if node.op_type == "LayerNormalization")
    rename(proto, last.output[0], "every_token")
    proto.graph.output.append(tokens)
    onnx.save(proto, door.model)
    door(door.model, "--plan", door.plan, "-o", door.output)
    assert door.code == 3
    assert "--outputs" in door.error
    report = door.slim("--outputs", "logits")
    assert [value.name for value in onnx.load(door.output).graph.output] == ["logits"]
    assert report["macs_reduction"] > 0.5


def rename(proto: onnx.ModelProto, old: str, new: str) -> None:
    for node in proto.graph.node:
        for side in (node.input, node.output):
            side[:] = [new if name == old else name for name in side]


def test_a_model_for_any_image_size_is_fixed_at_one(door: Door, plan: SlimPlan) -> None:
    proto = onnx.load(door.model)
    del proto.graph.value_info[:]
    for axis, name in ((2, "height"), (3, "width")):
        proto.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    onnx.save(proto, door.model)
    door(door.model, "--plan", door.plan, "-o", door.output)
    assert door.code == 3
    door.slim("--image-size", "32x32")
    wanted = reference(dense("plain")[0], plan, IMAGES)
    np.testing.assert_allclose(ort_logits(onnx.load(door.output), IMAGES), wanted, atol=1e-4)


def test_another_layout_changes_nothing_in_a_graph_that_is_cut_already(door: Door) -> None:
    door.slim("--layout", "split")
    again = door(door.output, "--plan", door.plan, "--layout", "packed")
    assert door.code == 0
    assert again["modified"] is False
    assert again["before"] == again["after"]

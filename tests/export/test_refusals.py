"""What an export refuses, by exit code, before it makes anything; and what its dry run and ``--json`` print."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from export import export_bundle
from export.run import run
from patchslim.errors import PatchslimError
from tests.helpers.commands import door_here
from tests.helpers.exports import ARGUMENTS, DEPTH, MODEL, change_plan, command, door, read, tiny
from tests.helpers.forks import run_command
from validate import check_bundle

if TYPE_CHECKING:
    from export.pipeline import Outcome


def refused(tmp_path: Path, **changes: Any) -> PatchslimError:
    """The error that both the run and the dry run meet; nothing is made by either."""
    before = set(tmp_path.rglob("*"))
    with pytest.raises(PatchslimError) as dry:
        run(tiny(tmp_path / "work", dry_run=True, **changes))
    with pytest.raises(PatchslimError) as real:
        export_bundle(tiny(tmp_path / "work", **changes))
    assert (type(dry.value), str(dry.value)) == (type(real.value), str(real.value))
    assert set(tmp_path.rglob("*")) == before
    return real.value


@pytest.mark.parametrize(
    ("changes", "code", "named"),
    [
        ({"plan": Path("plan.json"), "dense": True}, 2, "--plan and --dense contradict each other"),
        ({"target": ("sm89",)}, 2, "--target needs --engine trt"),
        ({"engine": "trt", "target": ("sm7",)}, 2, "sm7"),
        ({"engine": "ort,openvin"}, 2, "--engine ort,openvin: openvin; did you mean openvino?"),
        ({"engine": "abacus"}, 2, "--engine abacus: must be ort, openvino, trt, several of them with commas, or all"),
        ({"engine": "ort,ort"}, 2, "names ort twice"),
        ({"engine": "ort,"}, 2, "a name is missing"),
        ({"engine": ""}, 2, "a name is missing"),
        ({"engine": "ort,all"}, 2, "all stands alone"),
        ({"engine": "ort,openvino", "precision": "fp16"}, 2, "--precision fp16: openvino takes fp32, bf16, int8"),
        ({"engine": "openvino,ort", "precision": "auto"}, 2, "--precision auto is for --engine openvino; ort takes"),
        ({"engine": "ort,openvino", "target": ("sm89",)}, 2, "--target needs --engine trt"),
        ({"engine": "ort,openvino", "batch": "1:2:4"}, 2, "--batch 1:2:4 needs --engine trt"),
        ({"engine": "ort,openvino", "require_fused_attention": True}, 2, "--require-fused-attention needs --engine trt"),
        ({"engine": "ort,trt", "hint": "throughput"}, 2, "--hint throughput is for --engine openvino"),
        (
            {"engine": "ort,openvino", "hint": "throughput", "latency_reduction": 0.2},
            2,
            "--hint throughput and --latency-reduction contradict each other",
        ),
        ({"engine": "ort,trt", "keep_fp32": ("x",)}, 2, "--keep-fp32 is for --precision int8"),
        ({"eval_images": 0}, 2, "--eval-images 0"),
        ({"calibration_images": 0}, 2, "--calibration-images 0"),
        ({"max_top1_drop": -0.1}, 2, "--max-top1-drop -0.1"),
        ({"max_top1_drop": float("nan")}, 2, "--max-top1-drop nan"),
        ({"batch_size": 0}, 2, "--batch-size 0"),
        ({"macs_reduction": 1.0}, 2, "--macs-reduction 1.0"),
        ({"tolerance": -1.0}, 2, "--tolerance -1.0"),
        ({"tolerance": float("inf")}, 2, "--tolerance inf"),
        ({"crop_pct": 5.0}, 2, "--crop-pct 5.0"),
        ({"crop_pct": float("nan")}, 2, "--crop-pct nan"),
        ({"seed": -1}, 2, "--seed -1"),
        ({"seed": 2**70}, 2, "--seed"),
        ({"data": ""}, 2, "--data"),
        ({"engine": "trt", "target": ("sm75",), "precision": "fp32"}, 2, "sm75"),
        ({"mean": (0.5, 0.5)}, 2, "--mean and --std"),
        ({"model_arg": ("depth",)}, 2, "--model-arg depth: expected key=value"),
        ({"model": "vit_enormous"}, 3, "vit_enormous: not a preset"),
        ({"model": "swin_tiny_patch4_window7_224", "model_arg": ()}, 3, "swin_tiny_patch4_window7_224"),
        ({"model": "resnet18", "model_arg": (), "weights": "bundled"}, 3, "its family ResNet is not supported"),
        ({"model_arg": (*ARGUMENTS, "wings=2")}, 3, "timm refuses"),
        ({"model_arg": ("num_heads=0",)}, 3, "timm refuses"),
        ({"model_arg": (*ARGUMENTS, "act_layer=nonsense")}, 3, "timm refuses"),
        ({"model_arg": (*ARGUMENTS, "in_chans=1")}, 3, "takes 1 channels"),
        ({"model_arg": ("depth=0",)}, 3, "no blocks"),
        ({"model_arg": (*ARGUMENTS[1:], "img_size=5")}, 3, "holds no patch"),
        ({"model_arg": (*ARGUMENTS, "num_classes=7")}, 3, "digits has 10 classes, the model 7"),
        ({"model": "deit_s", "weights": "bundled"}, 4, "no weights are bundled for deit_s"),
        ({"weights": "/nowhere/weights.safetensors"}, 3, "no such weights file"),
        ({"data": "/nowhere/images"}, 3, "/nowhere/images: no such data"),
        ({"plan": Path("/nowhere/plan.json")}, 3, "cannot be read as a plan"),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], code: int, named: str) -> None:
    if changes.get("engine") == "trt":
        pytest.importorskip("tensorrt_rtx")
    error = refused(tmp_path, **changes)
    assert error.exit_code == code
    assert named in str(error)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_corrupt_weights(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"\x93 not weights at all")
    error = refused(tmp_path, weights=str(path))
    assert error.exit_code == 3
    assert str(path) in str(error)


def test_a_plan_for_another_model_is_refused_by_the_dry_run_too(ort_export: Outcome, tmp_path: Path) -> None:
    plan = change_plan(ort_export.bundle / "plan.json", tmp_path / "plan.json", [[0]] * (DEPTH - 1))
    assert refused(tmp_path, plan=plan).exit_code == 3


def test_a_plan_under_another_models_name_is_refused_by_the_dry_run_too(ort_export: Outcome, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(read(ort_export.bundle / "plan.json") | {"model": "vit_small_patch16_224"}), encoding="utf-8")
    error = refused(tmp_path, plan=plan)
    assert error.exit_code == 3
    assert "was made for vit_small_patch16_224" in str(error)


def test_a_folder_with_something_of_the_users_is_not_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"name": "a web application"}')
    assert "holds manifest.json, which is not of a bundle" in str(refused(tmp_path, output=folder))
    (folder / "manifest.json").write_text('{"plan_digest": "", "files": [{"path": "model.onnx"}]}')
    (folder / "model.onnx").touch()
    (folder / "notes.txt").touch()
    error = refused(tmp_path, output=folder)
    assert error.exit_code == 2
    assert "holds manifest.json, which is not of a bundle" in str(error)  # a manifest that we would not write proves nothing


def test_held_out_classes_that_the_model_does_not_have(export_work: Path, tmp_path: Path) -> None:
    for label in "abcdefghijkl":
        for number in range(3):
            place = tmp_path / "data" / "val" / label / f"{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 64), (20 * number, ord(label), 90)).save(place)
    ten = (*ARGUMENTS, "num_classes=10")
    options = tiny(export_work, "classes", data=str(tmp_path / "data"), calibration_data="digits", model_arg=ten)
    with pytest.raises(PatchslimError, match="has 12 classes, the model 10") as caught:
        export_bundle(options)
    assert caught.value.exit_code == 3
    assert not (export_work.parent / "classes").exists()


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_pretrained_weights_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    arguments = command(tmp_path / "work", "bundle", "--weights", "pretrained")
    if alone:
        empty = {"HF_HOME": str(tmp_path / "hub"), "TORCH_HOME": str(tmp_path / "torch"), "HF_HUB_OFFLINE": "1"}
        done = door(arguments, env=os.environ | empty)
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
        done = door_here(arguments)
    assert done.returncode == 4, done.stderr
    assert "--weights PATH" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("more", [[], ["--dry-run", "--json"]])
def test_a_missing_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    for name in ("tensorrt_rtx", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    done = door_here(command(tmp_path / "work", "bundle", "--engine", "trt", *more))
    assert done.returncode == 4, done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
    assert [json.loads(line)["error"]["code"] for line in done.stdout.splitlines()] == ([4] if more else [])
    assert not list(tmp_path.iterdir())


def test_the_dry_run_makes_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(tiny(tmp_path / "work", dry_run=True, json=True)) == 0
    described = json.loads(capsys.readouterr().out)
    assert (described["model"], described["weights"], described["backend"]) == (MODEL, "random", "onnxruntime")
    assert (described["plan"], described["precision"], described["targets"]) == ("to be searched", "fp32", ["cpu"])
    assert described["calibration"] == {"data": "digits", "split": "train", "share": "all", "images": 24}
    assert described["evaluation"] == {"data": "digits", "split": "test", "share": "all", "images": 40}
    assert described["bundle"] == str(tmp_path / "bundle")
    assert not list(tmp_path.iterdir())
    assert run(tiny(tmp_path / "work", dry_run=True)) == 0
    assert "to be searched" in capsys.readouterr().out


def test_the_dry_run_knows_a_finished_plan(ort_export: Outcome, export_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(export_work, "tiny-ort", dry_run=True, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "found already"
    assert run(tiny(export_work, "tiny-ort", dry_run=True, json=True, macs_reduction=0.123)) == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "to be searched"


def test_json_is_one_object_on_stdout_and_logs_are_on_stderr(ort_export: Outcome, export_work: Path, tmp_path: Path) -> None:
    done = run_command(command(export_work, "json", "--json", "--macs-reduction", "0.25"), tmp_path)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert done.stdout.count("\n") == 1
    manifest = read(export_work.parent / "json" / "manifest.json")
    for field in ("macs", "rungs", "tokens_per_block"):
        assert printed[field] == manifest[field]
    assert manifest["engine"].items() <= printed["engine"].items()
    assert Path(printed["bundle"]) == export_work.parent / "json"
    assert Path(printed["dense_onnx"]).is_file()
    files = [path for path in Path(printed["bundle"]).rglob("*") if path.is_file()]
    assert printed["size"] == sum(path.stat().st_size for path in files)
    assert printed["passed"]
    assert "cutting tokens out of the graph" in done.stderr
    assert check_bundle(Path(printed["bundle"])).passed


def test_the_closing_table_says_what_counts(ort_export: Outcome, export_work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tiny(export_work, "tiny-ort")) == 0
    shown = capsys.readouterr().out
    for text in ("onnx-slim", f"{ort_export.macs.reduction:.1%} removed", "split qkv", "top-1 on 40 held-out images"):
        assert text in shown
    assert "tiny-ort" in shown.replace("\n", "")

"""Through the doors, from an ONNX file to a plan and a slim file, without a PyTorch model; and what is refused."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from graph_passes import run as graph_passes_run
from patchslim.errors import PatchslimError
from patchslim.plan import load_plan
from slimming.run import SlimmingOptions, run
from tests.helpers.commands import door_here
from tests.helpers.corpus import by_name, exported
from tests.helpers.corpus import reference as corpus_reference
from tests.helpers.onnx_files import graph_file, picture_folder
from tests.helpers.onnx_models import dense, plan_for, reference, tiny_cnn

pytestmark = pytest.mark.numeric


@pytest.fixture(scope="module")
def images() -> Path:
    return picture_folder()


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def answers(path: Path, images: Any) -> Any:
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.asarray(images)})[0]


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("plain", None),
        ("hf_vit-optimum18", 32),
        ("hf_vit-dynamo20", None),
        pytest.param("hf_dinov2-dynamo20", None, marks=pytest.mark.slow),
    ],
)
def test_two_doors_from_a_file_to_a_slim_file_and_no_pytorch_model_in_between(
    name: str, side: int | None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, plan_path, slim = graph_file(name), tmp_path / "plan.json", tmp_path / "slim.onnx"

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("a PyTorch model was made")

    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", never)
        patch.setattr(timm.models, "create_model", never)
        patch.setattr(VisionTransformer, "__init__", never)
        measured = {"eval_images": 20} if name == "plain" else {}
        options = SlimmingOptions(
            onnx=path, data=str(images), output=plan_path, img_size=side, json=True, macs_reduction=0.3, **measured
        )
        assert run(options) == 0
    shown = capsys.readouterr()
    assert "mean 0.485, 0.456, 0.406" in " ".join(shown.err.split())
    summary = json.loads(shown.out)
    assert (tmp_path / "plan.html").is_file()
    assert summary["weights"] is None
    plan = load_plan(plan_path)
    assert plan.model == path.stem.replace(":", "_")
    size: dict[str, Any] = {} if side is None else {"image_size": str(side)}
    assert graph_passes_run.run(graph_passes_run.PassOptions(model=path, plan=plan_path, output=slim, **size)) == 0
    given = pixels(1).numpy()
    if name == "plain":
        expected = reference(dense("plain")[0], plan, pixels(1))
        (point,) = summary["sweep"]
        assert 0 <= point["top1"] <= 100
        assert 0 < point["agreement"] <= 100
        assert summary["dense_top1"] == pytest.approx(_top1(path, images))
    else:
        expected = corpus_reference(by_name(name), plan.kept, given)
    np.testing.assert_allclose(answers(slim, given), expected, rtol=0, atol=1e-4)


def _top1(path: Path, images: Path) -> float:
    """Top-1 of a graph over a folder, by hand."""
    from timm.data import resolve_data_config

    transform = create_transform(**resolve_data_config(args={"input_size": (3, 32, 32)}, pretrained_cfg={}))
    hits = []
    for file in sorted((images / "val").rglob("*.png")):
        tensor = transform(Image.open(file).convert("RGB"))
        hits.append(answers(path, tensor[None].numpy()).argmax() == int(file.parent.name))
    return 100 * float(np.mean(hits))


def uint8_graph() -> onnx.ModelProto:
    """The plain model behind a Cast from bytes."""
    model = copy.deepcopy(dense("plain")[1])
    name = model.graph.input[0].name
    model.graph.input[0].name = "bytes"
    model.graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.UINT8
    model.graph.node.insert(0, onnx.helper.make_node("Cast", ["bytes"], [name], to=onnx.TensorProto.FLOAT))
    return model


def resizing_graph() -> onnx.ModelProto:
    """The plain model behind a Resize of images of any size."""
    model = copy.deepcopy(dense("plain")[1])
    name = model.graph.input[0].name
    del model.graph.input[:]
    model.graph.input.append(onnx.helper.make_tensor_value_info("given", onnx.TensorProto.FLOAT, [1, 3, "rows", "columns"]))
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, 3, 32, 32]), "sizes_to"))
    model.graph.node.insert(0, onnx.helper.make_node("Resize", ["given", "", "", "sizes_to"], [name]))
    return model


def cut_graph() -> onnx.ModelProto:
    """The plain model, already cut."""
    from graph_passes import slim

    model, proto = dense("plain")
    plan = plan_for(model, [list(range(count)) for count in (14, 9, 4, 1)])
    return slim(proto, plan).model.to_proto()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tiny_cnn, "no Softmax that weighs values"),
        (uint8_graph, "expected normalised images; it takes uint8"),
        (resizing_graph, "make the plan from the same model without that"),
        (cut_graph, "plans are made from the dense graph"),
        (lambda: exported(by_name("hf_vit-optimum18")), "give the size with --img-size"),
    ],
)
def test_a_graph_that_cannot_be_searched_is_refused_by_name(make: Any, message: str, images: Path, tmp_path: Path) -> None:
    path = tmp_path / "graph.onnx"
    onnx.save(make(), path)
    with pytest.raises(PatchslimError, match=message) as refused:
        run(SlimmingOptions(onnx=path, data=str(images), output=tmp_path / "plan.json"))
    assert refused.value.exit_code == 3
    assert str(path) in str(refused.value)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("options", "message", "code"),
    [
        ({"model": "vit_s"}, "--model contradict", 2),
        ({"weights": "random"}, "--weights contradict", 2),
        ({"model_arg": ("img_size=32",)}, "--model-arg contradict", 2),
        ({"fit": "sgd"}, "--fit sgd changes weights by PyTorch", 2),
        ({"finetune_epochs": 1.0}, "--finetune-epochs changes weights", 2),
        ({"summary": True}, "--summary changes weights", 2),
        ({"latency_reduction": 0.3, "latency_table": Path("table.json")}, "latency table that export.run measures", 2),
        ({"device": "cuda"}, "on the CPU", 2),
        ({"img_size": 64}, "cannot be 64 x 64", 2),
        ({"tokens": "17,17,17"}, "3 token counts for 4 blocks", 2),
        ({"tokens": "17,9,5,2"}, "what the head reads, 1", 2),
        ({"data": "no/such/folder"}, "no such data", 3),
        ({"data": "no/such/folder", "eval_images": 4}, "no such data", 3),
        ({"macs_reduction": 0.99}, "nearest reachable", 6),
    ],
)
def test_options_that_contradict_a_graph_are_refused(
    options: dict[str, Any], message: str, code: int, images: Path, tmp_path: Path
) -> None:
    given = {"onnx": graph_file("plain"), "data": str(images), "output": tmp_path / "plan.json", **options}
    with pytest.raises(PatchslimError, match=message) as refused:
        run(SlimmingOptions(**given))
    assert refused.value.exit_code == code
    assert not (tmp_path / "plan.json").exists()


def test_labels_of_other_classes_are_refused_before_the_search(tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "data" / label / f"{number}.png")
    with pytest.raises(PatchslimError, match=r"has 2 classes, .* gives 10 answers") as refused:
        run(
            SlimmingOptions(onnx=graph_file("plain"), data=str(tmp_path / "data"), output=tmp_path / "plan.json", eval_images=4)
        )
    assert refused.value.exit_code == 3


def test_the_command_line_says_what_is_no_graph(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slimming.run", "--onnx", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "plan.json")]
    done = door_here(command)
    assert done.returncode == 3
    assert "none.onnx" in done.stderr
    assert "Traceback" not in done.stderr

"""Plans from ONNX graphs alone: the same as from the PyTorch model that was exported, and fit for ``graph_passes.run``."""

from __future__ import annotations

import copy
import functools
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
from patchslim.errors import BudgetUnreachable, PatchslimError
from patchslim.plan import SlimPlan, load_plan
from slimming.api import FinderSettings, PlanFinder
from slimming.data.source import calibration_set
from slimming.models.reader import reader_of
from slimming.models.vit_reader import VitReader
from slimming.onnx_models.reader import GraphReader
from slimming.run import SlimmingOptions, run
from slimming.search.budget import Budget
from slimming.search.costs import MacsCost
from slimming.search.request import PlanRequest
from slimming.search.scores import score_named
from slimming.search.top_down import TopDownSearch
from tests.helpers.commands import door_here
from tests.helpers.corpus import built as built_case
from tests.helpers.corpus import by_name, exported
from tests.helpers.corpus import reference as corpus_reference
from tests.helpers.onnx_models import dense, plan_for, reference, tiny_cnn

pytestmark = pytest.mark.numeric

TRANSFORM = create_transform(input_size=(3, 32, 32), crop_pct=1.0)
POOLS = {"avg": "timm_avg_class-script17", "map": "timm_map-dynamo20-unfused"}
COUNTS = {"plain": (15, 11, 6, 1), "distilled": (18, 12, 7, 2), "registers": (19, 13, 9, 1)}


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of random pictures, two of each for calibration and two for evaluation."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(10):
            (folder / split / str(label)).mkdir(parents=True)
            for number in range(2):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / str(label) / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The path of a model's ONNX file: a tiny timm model's, or that of a case of the corpus."""
    folder, written = tmp_path_factory.mktemp("graphs"), dict[str, Path]()

    def path_of(name: str) -> Path:
        if name not in written:
            written[name] = folder / f"{name.replace(':', '_')}.onnx"
            onnx.save(exported(by_name(name)) if "-" in name else dense(name)[1], written[name])
        return written[name]

    return path_of


def both(kind: str, path: Path, images: Path, mode: Any = "compact") -> list[PlanFinder]:
    """A graph and its PyTorch original, calibrated on the same images."""
    chosen, settings = calibration_set(str(images), 20), FinderSettings(mode=mode)
    readers: list[VitReader] = [GraphReader(path), reader_of(dense(kind)[0])]
    return [PlanFinder(reader, chosen, name="tiny", transform=TRANSFORM, settings=settings) for reader in readers]


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def answers(path: Path, images: Any) -> Any:
    session = ort.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: np.asarray(images)})[0]


def masked(reader: GraphReader, plan: SlimPlan, images: Tensor) -> Tensor:
    """What the parts of a graph answer under a plan, one after the other."""
    tokens, present = reader.embed(images), list(range(reader.tokens))
    for block, kept in zip(reader.blocks, plan.kept, strict=True):
        result = block.run(reader.view(tokens, present, kept, None))
        if plan.mode == "stale":
            tokens = tokens.clone()
            tokens[:, kept] = result
        else:
            tokens, present = result, kept
    readable = [token for token in plan.kept[-1] if token in reader.head.tokens]
    return reader.head.logits(tokens[:, [present.index(token) for token in readable]])


# The same plan as from PyTorch


@pytest.fixture(scope="module")
def finders(files: Any, images: Path) -> Any:
    """``both`` of a kind and mode, whose features are computed once for all scores."""
    return functools.cache(lambda kind, mode: both(kind, files(kind), images, mode=mode))


@pytest.mark.parametrize("score", ["paper", "attention", "residual", "random"])
@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", ["plain", "distilled", "registers"])
def test_the_plan_is_the_one_found_from_the_pytorch_model(kind: str, score: Any, mode: Any, finders: Any) -> None:
    graph, original = finders(kind, mode)
    budget = Budget("tokens", tokens=COUNTS[kind])
    found, expected = (each.find_plan(PlanRequest(budget, score, mode=mode)).plan for each in (graph, original))
    assert found.kept == expected.kept
    assert found.counts == list(COUNTS[kind])
    assert found.model_copy(update={"origin": expected.origin}) == expected
    assert found.origin.errors == pytest.approx(expected.origin.errors, abs=1e-6, rel=1e-4)
    assert found.origin.calibration == expected.origin.calibration


@pytest.mark.parametrize("mode", ["compact", "stale"])
def test_errors_and_tolerance_are_those_of_the_pytorch_model(mode: Any, files: Any, images: Path) -> None:
    graph, original = both("plain", files("plain"), images, mode=mode)
    searches = (
        TopDownSearch(graph.features, score_named("paper", 0)),
        TopDownSearch(original.features, score_named("paper", 0)),
    )
    compared = []
    for block, kept, above in [(0, range(12), [0, 3]), (1, [0, 2, 9], [0]), (2, [0, 16], [0]), (2, [0, 1, 2, 3], [0, 1])]:
        found, expected = (search.error(block, list(kept), above) for search in searches)
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-4)
        compared.append(expected)
    assert min(compared) > 0
    tolerance = sorted(compared)[1]
    found, expected = (
        each.find_plan(PlanRequest(Budget("tolerance", tolerance), mode=mode)).plan for each in (graph, original)
    )
    assert found.kept == expected.kept
    assert not found.is_dense
    assert all(error <= tolerance for error in found.origin.errors)


@pytest.mark.parametrize("pooling", POOLS)
def test_a_head_that_pools_is_read_as_the_pytorch_model_reads_it(pooling: str, files: Any) -> None:
    from slimming.models.reader import ModelReader
    from tests.helpers.corpus.models import torch_model

    case = by_name(POOLS[pooling])
    reader, original = GraphReader(files(case.name)), ModelReader(torch_model(case.family, False))
    tokens = torch.randn(2, 9, 48, generator=torch.Generator().manual_seed(0))
    tolerance = 5e-2 if case.half else 1e-4
    with torch.inference_mode():
        assert (reader.head.pooling, reader.head.tokens) == (original.head.pooling, original.head.tokens)
        torch.testing.assert_close(reader.head.weights(tokens), original.head.weights(tokens), rtol=0, atol=tolerance)
        torch.testing.assert_close(reader.head.logits(tokens), original.head.logits(tokens), rtol=0, atol=tolerance)
        if pooling == "avg":
            torch.testing.assert_close(reader.head.pooled(tokens), original.head.pooled(tokens), rtol=0, atol=tolerance)


# Masks stand for cuts


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", ["plain", "registers"])
def test_a_masked_graph_answers_as_the_cut_one_and_as_pytorch(kind: str, mode: str, files: Any) -> None:
    model, _ = dense(kind)
    prefix = range(model.num_prefix_tokens)
    patches = torch.randperm(16, generator=torch.Generator().manual_seed(2)).add(len(prefix)).tolist()
    plan = plan_for(model, [[*prefix, *sorted(patches[:count])] for count in (14, 9, 4)] + [[0]], mode)
    reader = GraphReader(files(kind))
    with torch.inference_mode():
        found, cut = masked(reader, plan, pixels()), reader.slimmed(plan)(pixels())
    np.testing.assert_allclose(found, reference(model, plan, pixels()), rtol=0, atol=1e-4)
    np.testing.assert_allclose(cut, found, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "timm_layer_scale-script17-unfused-fp16",
        "hf_dinov2-script17-unfused",
        "timm_registers-dynamo23-static",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "timm_avg_class-dynamo20-unfused-fp16",
                "torchvision-dynamo23",
                "timm_map-script17-slim",
                "hf_vit-dynamo23",
                "hf_deit-script17-static",
                "timm_parallel_things-dynamo20-unfused",
                "timm_dinov3-dynamo20",
            )
        ),
    ],
)
def test_any_exporters_graph_is_searched_and_its_plan_means_what_pytorch_says(name: str, files: Any, images: Path) -> None:
    subject, case = built_case(by_name(name)), by_name(name)
    reader = GraphReader(files(name))
    graph = PlanFinder(reader, calibration_set(str(images), 8), name="foreign", transform=TRANSFORM)
    found = graph.find_plan(PlanRequest(Budget("macs-reduction", 0.3))).plan
    assert (found.tokens, found.grid, found.prefix_tokens) == (subject.tokens, subject.grid, subject.prefix)
    assert found.macs() <= 0.7 * found.dense_macs()
    assert set(subject.head_tokens) <= set(found.kept[-1])
    given = subject.images(4, 1)
    with torch.inference_mode():
        result = masked(reader, found, torch.from_numpy(given.astype(np.float32)))
    np.testing.assert_allclose(result, corpus_reference(case, found.kept, given), rtol=0, atol=subject.tolerance)


# Budgets


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_macs_budget_is_met_and_used(layout: Any, mode: Any, files: Any, images: Path) -> None:
    graph, original = both("plain", files("plain"), images, mode=mode)
    budget = Budget("macs-reduction", 0.4)
    found, expected = (
        each.find_plan(PlanRequest(budget, "paper", mode=mode, layout=layout)).plan for each in (graph, original)
    )
    assert found.kept == expected.kept
    dense_macs = found.dense_macs()
    step = MacsCost(17, 4, found.geometry, mode, layout)
    one_token = step.of([17, 17, 17, 1]) - step.of([16, 16, 16, 1])
    assert 0.6 * dense_macs - one_token < found.macs(layout) <= 0.6 * dense_macs


def test_a_head_that_reads_and_pools_stays_within_its_budget(files: Any, images: Path) -> None:
    graph = PlanFinder(
        GraphReader(files("hf_dinov2_registers-dynamo20-unfused")),
        calibration_set(str(images), 8),
        name="d",
        transform=TRANSFORM,
    )
    for reduction in (0.2, 0.5):
        found = graph.find_plan(PlanRequest(Budget("macs-reduction", reduction))).plan
        assert found.pooling == "avg"
        assert found.kept[-1][:5] == [0, 1, 2, 3, 4]
        assert len(found.kept[-1]) > 5
        assert 1 - reduction - 0.05 < found.macs() / found.dense_macs() <= 1 - reduction
    assert graph.find_plan(PlanRequest(Budget("tokens", tokens=(16, 12, 9)))).plan.counts == [16, 12, 9]
    assert all(error <= 0.01 for error in graph.find_plan(PlanRequest(Budget("tolerance", 0.01))).plan.origin.errors)
    for tolerance in (0.05, 0.2):  # rounded up by less than a step: the tokens beside the pool are counted once
        exact, up = (graph.find_plan(PlanRequest(Budget("tolerance", tolerance, snap=snap))).plan.counts for snap in (1, 2))
        assert all(0 <= more - count < 2 for count, more in zip(exact, up, strict=True))
    with pytest.raises(PatchslimError, match="at least 6"):
        graph.find_plan(PlanRequest(Budget("tokens", tokens=(16, 12, 5))))
    with pytest.raises(BudgetUnreachable, match="nearest reachable"):
        graph.find_plan(PlanRequest(Budget("macs-reduction", 0.99)))


def test_counts_are_snapped_and_uniform_where_that_is_asked(files: Any, images: Path) -> None:
    graph = PlanFinder(GraphReader(files("plain")), calibration_set(str(images), 8), name="t", transform=TRANSFORM)
    snapped = graph.find_plan(PlanRequest(Budget("macs-reduction", 0.3, snap=4))).plan
    assert all(count % 4 == 0 or count == 17 for count in snapped.counts[:-1])
    assert len(set(graph.find_plan(PlanRequest(Budget("macs-reduction", 0.3), "uniform")).plan.counts[:-1])) == 1


# Through the doors


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
    name: str, side: int | None, files: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    path, plan_path, slim = files(name), tmp_path / "plan.json", tmp_path / "slim.onnx"

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
    options: dict[str, Any], message: str, code: int, files: Any, images: Path, tmp_path: Path
) -> None:
    given = {"onnx": files("plain"), "data": str(images), "output": tmp_path / "plan.json", **options}
    with pytest.raises(PatchslimError, match=message) as refused:
        run(SlimmingOptions(**given))
    assert refused.value.exit_code == code
    assert not (tmp_path / "plan.json").exists()


def test_labels_of_other_classes_are_refused_before_the_search(files: Any, tmp_path: Path) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "data" / label).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "data" / label / f"{number}.png")
    with pytest.raises(PatchslimError, match=r"has 2 classes, .* gives 10 answers") as refused:
        run(SlimmingOptions(onnx=files("plain"), data=str(tmp_path / "data"), output=tmp_path / "plan.json", eval_images=4))
    assert refused.value.exit_code == 3


def test_the_command_line_says_what_is_no_graph(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "slimming.run", "--onnx", str(tmp_path / "none.onnx"), "-o", str(tmp_path / "plan.json")]
    done = door_here(command)
    assert done.returncode == 3
    assert "none.onnx" in done.stderr
    assert "Traceback" not in done.stderr

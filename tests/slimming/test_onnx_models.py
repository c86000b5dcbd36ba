"""Plans from ONNX graphs alone: the same as from the PyTorch model that was exported, and fit for ``graph_passes.run``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.data import create_transform
from torch import Tensor

from patchslim.errors import BudgetUnreachable, PatchslimError
from patchslim.plan import SlimPlan
from slimming.api import FinderSettings, PlanFinder
from slimming.data.source import calibration_set
from slimming.models.reader import reader_of
from slimming.models.vit_reader import VitReader
from slimming.onnx_models.reader import GraphReader
from slimming.search.budget import Budget
from slimming.search.costs import MacsCost
from slimming.search.request import PlanRequest
from slimming.search.scores import score_named
from slimming.search.top_down import TopDownSearch
from tests.helpers.corpus import built as built_case
from tests.helpers.corpus import by_name
from tests.helpers.corpus import reference as corpus_reference
from tests.helpers.onnx_files import graph_file, picture_folder
from tests.helpers.onnx_models import dense, plan_for, reference

pytestmark = pytest.mark.numeric

TRANSFORM = create_transform(input_size=(3, 32, 32), crop_pct=1.0)
POOLS = {"avg": "timm_avg_class-script17", "map": "timm_map-dynamo20-unfused"}
COUNTS = {"plain": (15, 11, 6, 1), "distilled": (18, 12, 7, 2), "registers": (19, 13, 9, 1)}


@pytest.fixture(scope="module")
def images() -> Path:
    return picture_folder()


def both(kind: str, path: Path, images: Path, mode: Any = "compact") -> list[PlanFinder]:
    """A graph and its PyTorch original, calibrated on the same images."""
    chosen, settings = calibration_set(str(images), 20), FinderSettings(mode=mode)
    readers: list[VitReader] = [GraphReader(path), reader_of(dense(kind)[0])]
    return [PlanFinder(reader, chosen, name="tiny", transform=TRANSFORM, settings=settings) for reader in readers]


def pixels(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


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
def finders(images: Path) -> Any:
    """``both`` of a kind and mode, whose features are computed once for all scores."""
    return functools.cache(lambda kind, mode: both(kind, graph_file(kind), images, mode=mode))


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
def test_errors_and_tolerance_are_those_of_the_pytorch_model(mode: Any, images: Path) -> None:
    graph, original = both("plain", graph_file("plain"), images, mode=mode)
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
def test_a_head_that_pools_is_read_as_the_pytorch_model_reads_it(pooling: str) -> None:
    from slimming.models.reader import ModelReader
    from tests.helpers.corpus.models import torch_model

    case = by_name(POOLS[pooling])
    reader, original = GraphReader(graph_file(case.name)), ModelReader(torch_model(case.family, False))
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
def test_a_masked_graph_answers_as_the_cut_one_and_as_pytorch(kind: str, mode: str) -> None:
    model, _ = dense(kind)
    prefix = range(model.num_prefix_tokens)
    patches = torch.randperm(16, generator=torch.Generator().manual_seed(2)).add(len(prefix)).tolist()
    plan = plan_for(model, [[*prefix, *sorted(patches[:count])] for count in (14, 9, 4)] + [[0]], mode)
    reader = GraphReader(graph_file(kind))
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
def test_any_exporters_graph_is_searched_and_its_plan_means_what_pytorch_says(name: str, images: Path) -> None:
    subject, case = built_case(by_name(name)), by_name(name)
    reader = GraphReader(graph_file(name))
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
def test_a_macs_budget_is_met_and_used(layout: Any, mode: Any, images: Path) -> None:
    graph, original = both("plain", graph_file("plain"), images, mode=mode)
    budget = Budget("macs-reduction", 0.4)
    found, expected = (
        each.find_plan(PlanRequest(budget, "paper", mode=mode, layout=layout)).plan for each in (graph, original)
    )
    assert found.kept == expected.kept
    dense_macs = found.dense_macs()
    step = MacsCost(17, 4, found.geometry, mode, layout)
    one_token = step.of([17, 17, 17, 1]) - step.of([16, 16, 16, 1])
    assert 0.6 * dense_macs - one_token < found.macs(layout) <= 0.6 * dense_macs


def test_a_head_that_reads_and_pools_stays_within_its_budget(images: Path) -> None:
    graph = PlanFinder(
        GraphReader(graph_file("hf_dinov2_registers-dynamo20-unfused")),
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


def test_counts_are_snapped_and_uniform_where_that_is_asked(images: Path) -> None:
    graph = PlanFinder(GraphReader(graph_file("plain")), calibration_set(str(images), 8), name="t", transform=TRANSFORM)
    snapped = graph.find_plan(PlanRequest(Budget("macs-reduction", 0.3, snap=4))).plan
    assert all(count % 4 == 0 or count == 17 for count in snapped.counts[:-1])
    assert len(set(graph.find_plan(PlanRequest(Budget("macs-reduction", 0.3), "uniform")).plan.counts[:-1])) == 1

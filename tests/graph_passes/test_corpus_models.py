"""The corpus itself: its graphs compute what their PyTorch models do, and its reference is what a plan means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers.corpus import CASES, REFUSED, built, by_name, plain, reference
from tests.helpers.corpus.models import DEPTH, FAMILIES, SIZE, torch_model

pytestmark = pytest.mark.numeric


def _images(batch: int) -> NDArray[np.float32]:
    return np.random.default_rng(2).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reference_that_drops_nothing_is_the_plain_model(family: str) -> None:
    case = next(case for case in CASES if case.family == family and not case.half)
    everything = [list(range(FAMILIES[family].tokens))] * DEPTH
    images = _images(2)
    np.testing.assert_allclose(reference(case, everything, images), plain(case, images), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_patch_is_missed_where_it_would_have_been_read(family: str) -> None:
    """Dropped by all blocks, a patch is missed; dropped by the last alone, it is missed by heads that pool and by no other."""
    case, subject = next(case for case in CASES if case.family == family and not case.half), FAMILIES[family]
    images = _images(1)
    short = [token for token in range(subject.tokens) if token != subject.prefix]
    slim = reference(case, [short] * DEPTH, images)
    assert np.abs(slim - plain(case, images)).max() > 1e-4, "dropping a patch changes nothing"
    late = reference(case, [list(range(subject.tokens))] * (DEPTH - 1) + [short], images)
    if subject.head in {"avg", "map", "token+avg"}:
        assert np.abs(late - plain(case, images)).max() > 1e-5, "the head still sees the dropped patch"
    else:
        np.testing.assert_allclose(late, plain(case, images), rtol=0, atol=1e-5)


PLAN = [[0, 1, 3, 4, 7, 8, 12, 15, 16], [0, 3, 7, 8, 15], [0, 7, 15]]


@torch.no_grad()
def _timm_with_rows_deleted(family: str, kept: list[list[int]], images: NDArray[np.float32]) -> NDArray[np.float32]:
    """timm's own layers, by hand: softmax(q k^T) v on rows that really are gone."""
    model = torch_model(family, True)
    tokens = model._pos_embed(model.patch_embed(torch.from_numpy(images)))
    indices = list(range(tokens.shape[1]))
    for block, keep in zip(model.blocks, kept, strict=True):
        rows = [indices.index(token) for token in keep]
        normed, heads = block.norm1(tokens), block.attn.num_heads
        qkv = block.attn.qkv(normed).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0][:, :, rows], qkv[1], qkv[2]
        mixed = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5, dim=-1) @ value
        tokens = tokens[:, rows] + block.attn.proj(mixed.transpose(1, 2).flatten(2))
        tokens = tokens + block.mlp(block.norm2(tokens))
        indices = keep
    normed = model.norm(tokens)
    patches = [row for row, token in enumerate(indices) if token > 0]
    pooled = normed[:, 0] if model.global_pool == "token" else normed[:, patches].mean(dim=1)
    result: NDArray[np.float32] = model.head(model.fc_norm(pooled)).numpy()
    return result


@pytest.mark.parametrize("name", ["timm_class-script17", "timm_avg_class-script17"])
@pytest.mark.parametrize("kept", [PLAN, [PLAN[0], PLAN[1], [7, 15]]], ids=["with class token", "class token dropped last"])
def test_masking_equals_deleting_rows(name: str, kept: list[list[int]]) -> None:
    case = by_name(name)
    if built(case).head == "token" and 0 not in kept[-1]:
        kept = [*kept[:-1], [0]]
    images = built(case).images(4, 2)
    expected = _timm_with_rows_deleted(case.family, kept, images)
    np.testing.assert_allclose(reference(case, kept, images), expected, rtol=0, atol=1e-5)


def test_names_are_unique_and_every_kind_of_export_meets_several_families() -> None:
    names = [case.name for case in [*CASES, *REFUSED]]
    assert len(names) == len(set(names))
    kinds = {
        "dynamo 18": lambda case: (case.exporter, case.opset) == ("dynamo", 18),
        "dynamo 20": lambda case: (case.exporter, case.opset) == ("dynamo", 20),
        "dynamo 23": lambda case: (case.exporter, case.opset) == ("dynamo", 23),
        "torchscript 17": lambda case: (case.exporter, case.opset) == ("torchscript", 17),
        "torchscript 11 to 14": lambda case: case.exporter == "torchscript" and 11 <= case.opset <= 14,
        "optimum": lambda case: case.exporter == "optimum",
        "unfused": lambda case: not case.fused,
        "static": lambda case: not case.dynamic,
        "fp16": lambda case: case.half,
        "slim": lambda case: case.simplified,
        "unfolded": lambda case: not case.folded,
    }
    for kind, holds in kinds.items():
        assert len({case.family for case in CASES if holds(case)}) >= 2, kind
    assert {case.family for case in CASES} == set(FAMILIES)


def test_the_export_that_optimum_itself_made_answers_as_its_pytorch_model_did() -> None:
    """Made once by optimum, see ``fixtures/optimum_vit.md``."""
    fixtures = Path(__file__).parents[1] / "fixtures"
    recorded = np.load(fixtures / "optimum_vit.npz")
    session = ort.InferenceSession(str(fixtures / "optimum_vit.onnx"), providers=["CPUExecutionProvider"])
    logits = session.run(None, {"pixel_values": recorded["pixel_values"]})[0]
    np.testing.assert_allclose(logits, recorded["logits"], rtol=0, atol=1e-4)

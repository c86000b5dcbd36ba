"""Top-down searches on tiny models, of every kind of head."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from patchslim.choices import Layout
from slimming.models.reader import ModelReader
from slimming.search.costs import MacsCost
from slimming.search.features import DenseFeatures, FeatureSettings
from slimming.search.scores import PaperScore
from slimming.search.top_down import Selection, TopDownSearch
from tests.helpers.timm_models import build, images_for

IMAGES = 20
#: Models whose head pools, with and without prefix tokens.
POOLED: dict[str, dict[str, Any]] = {
    "avg": {"global_pool": "avg"},
    "avg, no class token": {"global_pool": "avg", "class_token": False},
    "map": {"global_pool": "map", "class_token": False},
    "map, registers": {"global_pool": "map", "reg_tokens": 2},
}


def features_of(model: Any, images: Tensor, bound: int = 1 << 30, **options: Any) -> DenseFeatures:
    return DenseFeatures(ModelReader(model), iter(images.split(8)), len(images), FeatureSettings(bound=bound, **options))


def search_of(kind: str = "class_token", step: int = 3, images: int = IMAGES, **options: Any) -> TopDownSearch:
    model = build(kind, patch_size=8, **options.pop("more", {}))  # 36 patches
    return TopDownSearch(features_of(model, images_for(model, images), **options), PaperScore(), step=step)


def cost_of(search: TopDownSearch, layout: Layout = "split") -> MacsCost:
    return MacsCost(search.tokens, search.depth, search.reader.geometry(), search.features.mode, layout)


def within(search: TopDownSearch, removed: float, layout: Layout = "split") -> Selection:
    cost = cost_of(search, layout)
    return search.by_budget(cost, (1 - removed) * cost.dense())


def counts_of(found: Selection) -> list[int]:
    return [len(kept) for kept in found.kept]

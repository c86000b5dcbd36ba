"""The path Gram against the enumeration of every head path, and every score against a slow one written out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from patchslim.choices import ScoreName
from slimming.models.reader import ModelReader
from slimming.search.features import DenseFeatures, FeatureSettings
from slimming.search.scores import PathGram, Score, State, input_magnitude, paper_score, score_named
from slimming.search.top_down import TopDownSearch
from tests.helpers.timm_models import build, images_for

pytestmark = pytest.mark.numeric

EXACT: dict[str, float] = {"rtol": 1e-9, "atol": 1e-12}


def random_attention(rng: torch.Generator, heads: int, queries: int, tokens: int) -> Tensor:
    return torch.rand(1, heads, queries, tokens, generator=rng, dtype=torch.float64).mul(6).softmax(-1)


def enumerated(top_rows: int, maps: list[Tensor]) -> Tensor:
    """``sum over head paths of (A^T A)`` for maps (1, heads, rows, tokens) from the last block down, one path at a time."""
    total = torch.zeros(maps[-1].shape[3], maps[-1].shape[3], dtype=torch.float64)
    for path in itertools.product(*(range(attention.shape[1]) for attention in maps)):
        product = torch.eye(top_rows, dtype=torch.float64)
        for head, attention in zip(path, maps, strict=True):
            product = product @ attention[0, head]
        total += product.T @ product
    return total


def matrix_of(gram: PathGram) -> Tensor:
    return (gram.value @ gram.value.transpose(1, 2) if gram.is_factor else gram.value)[0]


@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("top_rows", [1, 2])
@pytest.mark.parametrize("shrinks", [False, True])
def test_the_recursion_is_the_enumeration(heads: int, top_rows: int, shrinks: bool) -> None:
    rng = torch.Generator().manual_seed(heads)
    counts = [top_rows, 3, 5, 9, 9] if shrinks else [9, 9, 9, 9, 9]
    maps, gram = [], PathGram.of_rows(1, counts[0], torch.float64)
    forms = [gram.is_factor]
    for rows, tokens in itertools.pairwise(counts):
        maps.append(random_attention(rng, heads, rows, tokens))
        torch.testing.assert_close(gram.diagonal_through(maps[-1]), gram.through(maps[-1]).diagonal(), **EXACT)
        gram = gram.through(maps[-1])
        forms.append(gram.is_factor)
        wanted = enumerated(counts[0], maps)
        torch.testing.assert_close(matrix_of(gram), wanted, **EXACT)
        torch.testing.assert_close(gram.diagonal()[0], wanted.diagonal(), **EXACT)
    assert forms == sorted(forms, reverse=True)  # a factor, and from some block on the matrix
    assert forms[-1] == (heads == 1)  # both forms were met


def test_images_of_a_batch_do_not_mix() -> None:
    rng = torch.Generator().manual_seed(0)
    levels = [[random_attention(rng, 2, rows, tokens) for rows, tokens in ((1, 4), (4, 6), (6, 6))] for _ in range(3)]
    together = PathGram.of_rows(3, 1, torch.float64)
    for level in zip(*levels, strict=True):
        together = together.through(torch.cat(level))
    for image, maps in enumerate(levels):
        torch.testing.assert_close(together.diagonal()[image], enumerated(1, maps).diagonal(), **EXACT)


def literal_score(paths: list[Tensor], attention: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 6 for one image: every path's A (rows, N) and every head's U outer-multiplied, Frobenius norms summed."""
    score = torch.zeros(tokens.shape[0], dtype=torch.float64)
    for product, head in itertools.product(paths, attention):
        mixed = head @ tokens.abs()
        for token in range(len(score)):
            score[token] += torch.linalg.matrix_norm(torch.outer(product[:, token], mixed[token])) ** 2
    return score


def test_paper_score_is_equation_6_with_outer_products() -> None:
    rng = torch.Generator().manual_seed(3)
    images, wanted = 2, torch.zeros(5, dtype=torch.float64)
    diagonals, magnitudes = [], []
    for _ in range(images):
        maps = [random_attention(rng, 2, 2, 4), random_attention(rng, 2, 4, 5)]
        here = random_attention(rng, 2, 5, 5)
        tokens = torch.randn(1, 5, 3, generator=rng, dtype=torch.float64)
        paths = [maps[0][0, a] @ maps[1][0, b] for a in range(2) for b in range(2)]
        wanted += literal_score(paths, here[0], tokens[0])
        diagonals.append(PathGram.of_rows(1, 2, torch.float64).through(maps[0]).through(maps[1]).diagonal())
        magnitudes.append(input_magnitude(here, tokens))
    torch.testing.assert_close(paper_score(torch.cat(diagonals), torch.cat(magnitudes)), wanted, **EXACT)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("pools", [1, 2])
def test_a_pooling_head_starts_the_recursion_at_its_weights(heads: int, pools: int) -> None:
    """G starts as w w^T, summed over the columns of w: every path's A is led by w^T."""
    rng = torch.Generator().manual_seed(5)
    weights = torch.rand(1, 4, pools, generator=rng, dtype=torch.float64)
    maps, gram = [], PathGram(weights, is_factor=True)
    torch.testing.assert_close(matrix_of(gram), sum(torch.outer(w, w) for w in weights[0].T), **EXACT)
    for rows, tokens in ((4, 6), (6, 7), (7, 7)):
        maps.append(random_attention(rng, heads, rows, tokens))
        torch.testing.assert_close(gram.diagonal_through(maps[-1]), gram.through(maps[-1]).diagonal(), **EXACT)
        gram = gram.through(maps[-1])
        wanted = torch.zeros(tokens, dtype=torch.float64)
        for path, column in itertools.product(itertools.product(range(heads), repeat=len(maps)), weights[0].T):
            product = column
            for head, attention in zip(path, maps, strict=True):
                product = product @ attention[0, head]
            wanted += product.square()
        torch.testing.assert_close(gram.diagonal()[0], wanted, **EXACT)


def test_both_ways_to_the_input_magnitude_are_its_definition() -> None:
    rng = torch.Generator().manual_seed(1)
    for tokens, width in ((4, 9), (9, 4), (5, 5)):  # the Gram of few tokens, or the mixed tokens themselves
        attention = random_attention(rng, 3, tokens, tokens)
        given = torch.randn(1, tokens, width, generator=rng, dtype=torch.float64)
        wanted = torch.zeros(1, tokens, dtype=torch.float64)
        for head, token in itertools.product(range(3), range(tokens)):
            mixed = sum(attention[0, head, token, other] * given[0, other].abs() for other in range(tokens))
            wanted[0, token] += mixed.square().sum()  # type: ignore[union-attr]
        torch.testing.assert_close(input_magnitude(attention, given), wanted, **EXACT)
        wide = torch.cat([given, torch.zeros(1, tokens, 20, dtype=torch.float64)], dim=2)  # the other way to the same
        torch.testing.assert_close(input_magnitude(attention, wide), wanted, **EXACT)


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("class_token", {}),
    "distilled": ("distilled", {}),
    "avg": ("class_token", {"global_pool": "avg"}),
    "map": ("class_token", {"global_pool": "map", "class_token": False}),
}
DEPTH = 3


class Slow:
    """One image of a model through its dense blocks, and what block ``level`` looks at, on N x N matrices.

    ``maps`` has rows of zeros for queries that are not kept and, in compact form, columns of zeros for tokens that are gone.
    """

    def __init__(self, model: Any, image: Tensor, masks: list[list[int]], mode: str) -> None:
        self.reader, self.masks, self.mode = ModelReader(model), masks, mode
        self.count = self.reader.tokens
        self.dense = [self.reader.embed(image)]
        for block in model.blocks:
            self.dense.append(block(self.dense[-1]))

    def given(self, level: int, below: list[int]) -> tuple[Tensor, list[int]]:
        tokens = self.dense[level]
        if self.mode == "compact":
            return tokens[:, below], below
        mixed = self.dense[level - 1].clone()
        mixed[:, below] = tokens[:, below]
        return mixed, list(range(self.count))

    def maps(self, level: int, below: list[int], rows: list[int] | None = None) -> Tensor:
        """Softmax matrices (heads, N, N) of block ``level`` after ``below``; rows of its mask by default."""
        tokens, seen = self.given(level, below)
        module = self.reader.model.blocks[level].attn
        normed = self.reader.model.blocks[level].norm1(tokens)
        query, key, _ = module.qkv(normed).unflatten(-1, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).double()
        attention = (query[0] @ key[0].transpose(1, 2) / module.head_dim**0.5).softmax(-1)
        full = torch.zeros(module.num_heads, self.count, self.count, dtype=torch.float64)
        for row in self.masks[level] if rows is None else rows:
            full[:, row, seen] = attention[:, seen.index(row)]
        return full

    def value_norms(self, level: int, below: list[int]) -> Tensor:
        """Norms of block ``level``'s values (heads, N); 0 where a token is gone."""
        tokens, seen = self.given(level, below)
        module = self.reader.model.blocks[level].attn
        normed = self.reader.model.blocks[level].norm1(tokens)
        value = module.qkv(normed).unflatten(-1, (3, module.num_heads, -1))[0, :, 2].double()
        full = torch.zeros(module.num_heads, self.count, dtype=torch.float64)
        full[:, seen] = value.norm(dim=-1).T
        return full

    def levels(self, target: int) -> list[tuple[int, list[int]]]:
        """The blocks above ``target``'s output from the last down, and what each reads.

        The one right above reads every token, as the cut is not made yet; deeper ones what the mask below them leaves.
        """
        everything = list(range(self.count))
        return [
            (level, everything if level == target + 1 else self.masks[level - 1])
            for level in range(len(self.masks) - 1, target, -1)
        ]

    def weights(self) -> Tensor:
        """How the head hangs on each of the N tokens: one row per pooled feature."""
        model, kept = self.reader.model, self.masks[-1]
        if self.reader.head.pooling == "token":
            return torch.eye(self.count, dtype=torch.float64)[kept]
        row = torch.zeros(1, self.count, dtype=torch.float64)
        if self.reader.head.pooling == "avg":
            row[0, kept] = 1 / len(kept)
            return row
        pool = model.attn_pool
        key = pool.kv(model.norm(self.dense[-1][:, kept])).unflatten(-1, (2, pool.num_heads, -1))[0, :, 0].double()
        query = pool.q(pool.latent)[0, 0].unflatten(-1, (pool.num_heads, -1)).double()
        each = [(key[:, head] @ query[head] / pool.head_dim**0.5).softmax(0) for head in range(pool.num_heads)]
        row[0, kept] = sum(each) / len(each)  # type: ignore[arg-type]
        return row


def paper(slow: Slow, target: int) -> Tensor:
    """Eq. 6 with every path and every outer product."""
    levels = [slow.maps(level, below) for level, below in slow.levels(target)]
    paths = []
    for path in itertools.product(range(levels[0].shape[0]), repeat=len(levels)):
        product = slow.weights()
        for head, maps in zip(path, levels, strict=True):
            product = product @ maps[head]
        paths.append(product)
    everything = list(range(slow.count))
    return literal_score(paths, slow.maps(target, everything, everything), slow.dense[target][0].double())


def residual(slow: Slow, target: int) -> Tensor:
    """Relevance through I + P, loop by loop: what a row passes on is its own share as often as it spreads over values."""
    relevance = slow.weights().abs().sum(0)
    for level, below in slow.levels(target):
        maps, norms = slow.maps(level, below), slow.value_norms(level, below)
        spread = torch.zeros(slow.count, dtype=torch.float64)
        for head, row, column in itertools.product(range(len(maps)), slow.masks[level], range(slow.count)):
            spread[column] += relevance[row] * maps[head, row, column] * norms[head, column]
        relevance = relevance + spread * relevance.sum() / spread.sum()
        if level > target + 1:
            relevance = relevance / relevance.sum()
            gone = [token for token in range(slow.count) if token not in below]
            relevance[gone] = 0  # in stale form too: a token that is not updated takes no relevance further down
    return relevance


def attention(slow: Slow, target: int) -> Tensor:
    """The mean over heads and rows of what the block above gives each token."""
    maps = slow.maps(*slow.levels(target)[-1])
    rows = slow.masks[target + 1]
    return torch.stack([maps[:, row].mean(0) for row in rows]).mean(0)


ORACLES = {"paper": paper, "residual": residual, "attention": attention}


def search_of(model: Any, images: Tensor, score: Score, mode: Any = "compact") -> TopDownSearch:
    features = DenseFeatures(ModelReader(model), iter(images.split(8)), len(images), FeatureSettings(mode))
    return TopDownSearch(features, score, step=1)


def masks_of(model: Any, seed: int) -> list[list[int]]:
    """Nested masks, the last one fit for the model's head."""
    rng = random.Random(seed)
    reader = ModelReader(model)
    patches, masks = list(range(reader.prefix, reader.tokens)), []
    for left in (7, 5, 3):
        patches = sorted(rng.sample(patches, left))
        masks.append([*range(reader.prefix), *patches])
    return [*masks[:-1], reader.head.tokens if reader.head.fixed else patches]


@pytest.mark.parametrize("score", ORACLES)
@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("head", HEADS)
def test_the_searchs_scores_are_those_written_out(head: str, mode: Any, score: ScoreName) -> None:
    kind, more = HEADS[head]
    model = build(kind, depth=DEPTH, **more)
    images = images_for(model, 3)
    masks = masks_of(model, 4)
    found: dict[int, Tensor] = {}

    class Spied(TopDownSearch):
        def _by_significance(self, block: int, above: list[int], states: list[State], batches: list[int]) -> list[int]:
            found[block] = self.score.scores(block, self.tokens, self._looks(block, above, states, batches), sum)
            ranking = super()._by_significance(block, above, states, batches)
            assert ranking == found[block].argsort(descending=True, stable=True).tolist()
            return ranking

    search = search_of(model, images, score_named(score, 0), mode)
    search.__class__ = Spied
    search._walk(lambda block, base, above, ranking: (masks[block], 0.0), None)
    for target in (1, 0):
        wanted = sum(ORACLES[score](Slow(model, images[i : i + 1], masks, mode), target) for i in range(3))
        torch.testing.assert_close(found[target], wanted, rtol=2e-4, atol=1e-9)


def test_random_scores_are_the_seeds_and_the_blocks_however_often_they_are_asked() -> None:
    def unseen() -> Iterator[Any]:
        raise AssertionError("chance looks at no image")
        yield

    draws = []
    for seed, block in itertools.product((0, 1), (2, 0)):
        score = score_named("random", seed)
        draws.append(score.scores(block, 9, unseen(), sum).tolist())
        assert score.scores(block, 9, unseen(), sum).tolist() == draws[-1]
        assert score.head_scores(block, 9, unseen(), sum).tolist() == draws[-1]
    assert len({tuple(draw) for draw in draws}) == 4


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("head", HEADS)
def test_random_plans_are_the_seeds(head: str, mode: Any) -> None:
    kind, more = HEADS[head]
    model = build(kind, depth=DEPTH, **more)
    images = images_for(model, 3)
    last = 2 if kind == "distilled" else 1
    plans = [search_of(model, images, score_named("random", seed), mode).by_counts([7, 5, last]).kept for seed in (3, 3, 4)]
    assert plans[0] == plans[1] != plans[2]


def test_uniform_ranks_as_the_paper_does() -> None:
    assert type(score_named("uniform", 0)) is type(score_named("paper", 0))


@pytest.mark.parametrize("score", [*ORACLES, "random"])
@pytest.mark.parametrize("head", HEADS)
def test_batches_of_one_search_do_not_mix(head: str, score: ScoreName) -> None:
    """Scores are sums over images: the same images, twice as often, rank the same."""
    kind, more = HEADS[head]
    model = build(kind, depth=DEPTH, **more)
    images = images_for(model, 8)
    counts = [7, 5, 2 if kind == "distilled" else 1]
    once = search_of(model, images, score_named(score, 0)).by_counts(counts)
    twice = search_of(model, torch.cat([images, images]), score_named(score, 0)).by_counts(counts)
    assert once.kept == twice.kept
    assert once.errors == pytest.approx(twice.errors, rel=1e-5)

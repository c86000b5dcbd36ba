"""The path Gram against the enumeration of every head path, and the score against Eq. 6 written out with outer products."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from models_factory import build, images_for, random_masks
from torch import Tensor

from slimming.scores import PathGram, input_magnitude, paper_score
from slimming.search import TopDownSearch
from slimming.vit import attention_maps, embed, run_block

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


def literal_scores_of_model(model: Any, image: Tensor, masks: list[list[int]], mode: str, target: int) -> Tensor:
    """Eq. 6 at block ``target``'s output for one image, on N x N matrices with diag(m) written out as zeroed rows.

    Block target + 1 reads every token, as its input is not cut yet; deeper blocks read what their mask below leaves.
    """
    dense = [embed(model, image)]
    for block in model.blocks:
        dense.append(run_block(block, dense[-1]))
    count = dense[0].shape[1]
    levels = []
    for level in range(len(model.blocks) - 1, target, -1):
        below = list(range(count)) if level == target + 1 else masks[level - 1]
        full = torch.zeros(model.blocks[0].attn.num_heads, count, count, dtype=torch.float64)
        tokens = dense[level]
        if mode == "stale":
            tokens = dense[level - 1].clone()
            tokens[:, below] = dense[level][:, below]
        seen = below if mode == "compact" else list(range(count))
        attention = attention_maps(model.blocks[level], tokens[:, seen])[0].double()
        for row in masks[level]:
            full[:, row, seen] = attention[:, seen.index(row)]
        levels.append(full)
    paths = []
    for path in itertools.product(range(levels[0].shape[0]), repeat=len(levels)):
        product = levels[0][path[0]]
        for head, level_maps in zip(path[1:], levels[1:], strict=True):
            product = product @ level_maps[head]
        paths.append(product)
    here = attention_maps(model.blocks[target], dense[target])[0].double()
    return literal_score(paths, here, dense[target][0].double())


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("kind", ["class_token", "distilled"])
def test_the_searchs_scores_are_equation_6_on_the_model(mode: Any, kind: str) -> None:
    model = build(kind, depth=3)
    images = images_for(model, 3)
    masks = random_masks(model, random.Random(4))
    masks[-1] = [0, 1] if kind == "distilled" else [0]
    search = TopDownSearch(model, iter([images]), 3, mode=mode)
    grams = [PathGram.of_rows(3, len(masks[-1]))]
    for target in (1, 0):
        scores = search._scores(target, masks[target + 1], grams)
        wanted = sum(literal_scores_of_model(model, images[i : i + 1], masks, mode, target) for i in range(3)) / 3
        torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=0)
        grams = search._carried(target, masks[target], masks[target + 1], grams)

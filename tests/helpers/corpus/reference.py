"""What a token plan means: the dense PyTorch model with dropped tokens hidden from every attention and every mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional
from numpy.typing import NDArray
from torch import Tensor, nn

from tests.helpers.corpus.models import DEPTH, Family


@contextmanager
def _hidden_keys(shown: Sequence[Sequence[int]], tokens: int) -> Iterator[None]:
    """PyTorch's attention with minus infinity on the keys outside ``shown[i]`` in its i-th call.

    The models run with fused attention; only an ``nn.MultiheadAttention`` that returns its weights takes softmax explicitly.
    """
    calls = iter(shown)
    fused, softmax = torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.softmax

    def bias(reads: Sequence[int], like: Tensor) -> Tensor:
        hidden = torch.full((tokens,), float("-inf"), dtype=like.dtype)
        hidden[list(reads)] = 0.0
        return hidden

    def masked_fused(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *args: Any, **rest: Any
    ) -> Tensor:
        assert key.shape[-2] == tokens
        mask = bias(next(calls), query).expand(query.shape[-2], tokens)
        return fused(query, key, value, mask if attn_mask is None else mask + attn_mask, *args, **rest)

    def masked_softmax(scores: Tensor, *args: Any, **rest: Any) -> Tensor:
        assert scores.shape[-1] == tokens
        return softmax(scores + bias(next(calls), scores), *args, **rest)

    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused kernel for a whole layer, past both functions
    try:
        with (
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", masked_fused),
            mock.patch.object(torch.nn.functional, "softmax", masked_softmax),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    assert next(calls, None) is None, "the model has fewer attentions than its family says"


def _mean_over(kept: Sequence[int], pooled: Sequence[int]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A hook that replaces dropped rows by the mean of the kept ones, so that a mean over all is that of the kept ones."""
    dropped = sorted(set(pooled) - set(kept))
    present = sorted(set(pooled) & set(kept))
    assert present, "a head that averages needs at least one token"

    def replace(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, dropped] = output[:, present].mean(dim=1, keepdim=True)
        return output

    return replace


@torch.no_grad()
def masked_logits(model: nn.Module, family: Family, kept: Sequence[Sequence[int]], images: Tensor) -> NDArray[np.float32]:
    """Output (b, classes) of ``model`` (built with fused attention) under a nested plan.

    ``kept[l]`` are the sorted original indices of the tokens that block l computes; it reads keys and values of
    ``kept[l - 1]``, the first block of all tokens. A head that averages or attends over tokens sees ``kept[-1]`` alone.
    """
    assert len(kept) == DEPTH
    everything = list(range(family.tokens))
    shown = [reads for reads in [everything, *kept[:-1]] for _ in range(family.attentions)]
    if family.head == "map":
        shown.append(sorted(set(family.pooled) & set(kept[-1])))
    with ExitStack() as stack:
        if family.pool_input:
            hook = model.get_submodule(family.pool_input).register_forward_hook(_mean_over(kept[-1], family.pooled))
            stack.callback(hook.remove)
        stack.enter_context(_hidden_keys(shown, family.tokens))
        result: NDArray[np.float32] = model(images).numpy()
    return result

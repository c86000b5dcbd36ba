"""timm's attention without its fused kernel, where that is the slower one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def unfused_attention(module: nn.Module) -> Iterator[None]:
    """Compute timm's attentions under ``module`` by plain products for the block: on a CPU their fused backward is slower."""
    fused = [(part, part.fused_attn) for part in module.modules() if hasattr(part, "fused_attn")]
    try:
        for part, _ in fused:
            part.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for part, found in fused:
            part.fused_attn = found

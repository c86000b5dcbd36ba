"""Which models the ONNX passes can cut: fewer than plans can be found for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from slimming.door import InputRejected


def check_exportable(module: Any, name: str) -> None:
    """Refuse, by name and reason and before anything slow, a model whose exported graph the passes would refuse by node.

    Raises ``InputRejected``.
    """
    for reason in _faults(module):
        raise InputRejected(f"model {name}: {reason}; the ONNX passes cannot cut it yet (slimming.run finds a plan for it)")


def _faults(module: Any) -> Iterator[str]:
    from timm.layers import Attention, Mlp
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import Block, VisionTransformer
    from torch import nn

    if type(module) not in (VisionTransformer, VisionTransformerDistilled):
        yield f"it is an {type(module).__name__}, not a plain VisionTransformer"
        return
    if module.global_pool != "token" or module.attn_pool is not None:
        pooling = "map" if module.attn_pool is not None else module.global_pool
        yield f"its head pools ({pooling}) instead of reading a class token"
    for index, block in enumerate(module.blocks):
        if type(block) is not Block:
            yield f"block {index} is a {type(block).__name__}, not a pre-norm Block"
        elif type(block.attn) is not Attention or block.attn.gate is not None or not isinstance(block.attn.norm, nn.Identity):
            yield f"block {index}'s attention is not timm's plain one"
        elif type(block.mlp) is not Mlp or not isinstance(block.mlp.norm, nn.Identity):
            yield f"block {index}'s MLP {type(block.mlp).__name__} is not timm's plain one"

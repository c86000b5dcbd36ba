"""How timm's transformer blocks are read: residual stages, each a sum of branches that end in a linear output projection.

Whatever its kind, a block is ``x <- x + sum_j scale_j(W_j inner_j(x))`` once or twice. The first stage holds the attention and
so decides which tokens are computed; in the others every token is on its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock, ParallelThingsBlock, ResPostBlock
from torch import Tensor, nn

from slimming.models.attention import AttentionInput, AttentionReader, ParallelReader, attention_fault

Tokens = Callable[[Tensor], Tensor]
TimmMlp: TypeAlias = Mlp | GluMlp | SwiGLU
TimmBlock: TypeAlias = Block | EvaBlock | ResPostBlock | EvaBlockPostNorm | ParallelThingsBlock | ParallelScalingBlock


@dataclass(frozen=True)
class Branch:
    """One residual branch: ``scale(output(inner(view)))``. ``gamma`` is its LayerScale; None where a norm scales instead."""

    inner: Callable[[AttentionInput], Tensor]
    output: Callable[[Tensor], Tensor]
    scale: Tokens
    projection: nn.Linear | None  # the output as a layer that can be refitted; None where it cannot
    gamma: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """Branches that share one residual addition."""

    branches: list[Branch]

    def run(self, view: AttentionInput) -> Tensor:
        """Return the residual stream after the addition, at the queried tokens: (b, k, d)."""
        stream = view.queried
        for branch in self.branches:
            stream = stream + branch.scale(branch.output(branch.inner(view)))
        return stream


@dataclass(frozen=True)
class BlockReader:
    """A block as stages, its attentions and the norm in front of each, and its MACs per token."""

    module: nn.Module
    stages: list[Stage]
    attentions: list[tuple[Tokens, AttentionReader]]
    mlp_macs: int
    mlp_hidden_dim: int
    packed_mlp_dim: int = 0  # width of the projection of q, k and v that goes to the MLP's hidden layer

    def maps(self, view: AttentionInput) -> Tensor:
        """Return the softmax matrices P (b, heads, k, n); parallel attentions side by side."""
        found = [reader.maps(view.normed(norm)) for norm, reader in self.attentions]
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)

    def value_norms(self, view: AttentionInput) -> Tensor:
        """Return the norms of the values (b, heads, n); parallel attentions side by side."""
        return torch.cat([reader.values(view.normed(norm)).norm(dim=-1) for norm, reader in self.attentions], dim=1)

    def run(self, view: AttentionInput) -> Tensor:
        """Return the block's output at the queried tokens: (b, k, d)."""
        stream = self.stages[0].run(view)
        for stage in self.stages[1:]:
            stream = stage.run(AttentionInput(stream, stream))
        return stream

    @property
    def can_refit(self) -> bool:
        """Whether every output projection is a plain linear layer in front of at most a LayerScale."""
        return all(branch.projection is not None for stage in self.stages for branch in stage.branches)

    @property
    def norms(self) -> int:
        """How many norms are in front of attentions."""
        return sum(norm is not _same for norm, _ in self.attentions)

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of queries and of keys, summed over parallel attentions."""
        each = [reader.macs() for _, reader in self.attentions]
        return sum(query for query, _ in each), sum(key for _, key in each)


def _same(tokens: Tensor) -> Tensor:
    return tokens


def _mlp_inner(mlp: TimmMlp) -> Tokens:
    """Everything of an MLP before its output projection."""
    if type(mlp) is SwiGLU:
        return lambda x: mlp.norm(mlp.act(mlp.fc1_g(x)) * mlp.fc1_x(x))
    if isinstance(mlp, GluMlp):

        def gated(x: Tensor) -> Tensor:
            first, second = mlp.fc1(x).chunk(2, dim=mlp.chunk_dim)
            result: Tensor = mlp.norm(first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second)
            return result

        return gated
    return lambda x: mlp.norm(mlp.act(mlp.fc1(x)))


def _mlp_fault(mlp: nn.Module) -> str:
    if type(mlp) not in (Mlp, GluMlp, SwiGLU) and not isinstance(mlp, GluMlp):
        return f"MLP {type(mlp).__name__} is not supported"
    return "" if isinstance(mlp.fc2, nn.Linear) else "convolutional MLP is not supported"


def _mlp_macs(mlp: TimmMlp) -> tuple[int, int]:
    """MACs per token, and the width that the output projection reads."""
    layers = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)]
    return sum(layer.weight.numel() for layer in layers), int(mlp.fc2.in_features)


def _branch(inner: Callable[[AttentionInput], Tensor], projection: nn.Linear, scale: nn.Module | Tensor | None) -> Branch:
    if scale is None or isinstance(scale, nn.Identity):
        return Branch(inner, projection, _same, projection)
    gamma: Tensor = scale if isinstance(scale, Tensor) else scale.gamma  # type: ignore[assignment]
    return Branch(inner, projection, lambda x: x * gamma, projection, gamma)


def _attention_branch(norm: Tokens, reader: AttentionReader, scale: nn.Module | Tensor | None) -> Branch:
    return _branch(lambda view: reader.inner(view.normed(norm)), reader.output, scale)


def _mlp_branch(norm: Tokens, mlp: TimmMlp, scale: nn.Module | Tensor | None) -> Branch:
    inner = _mlp_inner(mlp)
    return _branch(lambda view: inner(norm(view.queried)), mlp.fc2, scale)


def _plain(block: Block | EvaBlock) -> BlockReader:
    """``Block`` and ``EvaBlock``: attention, then MLP, each after its norm."""
    attention = AttentionReader(block.attn)
    scales = (block.gamma_1, block.gamma_2) if isinstance(block, EvaBlock) else (block.ls1, block.ls2)
    stages = [
        Stage([_attention_branch(block.norm1, attention, scales[0])]),
        Stage([_mlp_branch(block.norm2, block.mlp, scales[1])]),
    ]
    return BlockReader(block, stages, [(block.norm1, attention)], *_mlp_macs(block.mlp))


def _post_norm(block: ResPostBlock | EvaBlockPostNorm) -> BlockReader:
    """``ResPostBlock`` and ``EvaBlockPostNorm``: the norm comes after the output projection, so there is no refit."""
    attention, inner = AttentionReader(block.attn), _mlp_inner(block.mlp)
    stages = [
        Stage([Branch(attention.inner, attention.output, block.norm1, None)]),
        Stage([Branch(lambda view: inner(view.queried), block.mlp.fc2, block.norm2, None)]),
    ]
    return BlockReader(block, stages, [(_same, attention)], *_mlp_macs(block.mlp))


def _parallel_things(block: ParallelThingsBlock) -> BlockReader:
    """Several attentions side by side, then several MLPs."""
    attentions = [(part.norm, AttentionReader(part.attn)) for part in block.attns]
    stages = [
        Stage(
            [_attention_branch(part.norm, reader, part.ls) for part, (_, reader) in zip(block.attns, attentions, strict=True)]
        ),
        Stage([_mlp_branch(part.norm, part.mlp, part.ls) for part in block.ffns]),
    ]
    macs = [_mlp_macs(part.mlp) for part in block.ffns]
    return BlockReader(block, stages, attentions, sum(each for each, _ in macs), sum(width for _, width in macs))


def _parallel_scaling(block: ParallelScalingBlock) -> BlockReader:
    """Attention and MLP side by side behind one input projection (ViT-22B)."""
    attention = ParallelReader(block)
    hidden = int(block.in_split[0])

    def mixed(view: AttentionInput) -> Tensor:
        return attention.inner(view.normed(block.in_norm))

    def activated(view: AttentionInput) -> Tensor:
        bias = block.in_proj.bias[:hidden] if block.mlp_bias is None else block.mlp_bias
        queried = view.normed(block.in_norm).queried
        projected = nn.functional.linear(queried, block.in_proj.weight[:hidden], bias)
        result: Tensor = block.mlp_act(projected)
        return result

    if block.out_proj is None:
        branches = [_branch(mixed, block.attn_out_proj, block.ls), _branch(activated, block.mlp_out_proj, block.ls)]
    else:
        branches = [_branch(lambda view: torch.cat([mixed(view), activated(view)], dim=-1), block.out_proj, block.ls)]
    width = int(block.in_norm.normalized_shape[0])
    return BlockReader(block, [Stage(branches)], [(block.in_norm, attention)], 2 * width * hidden, hidden, hidden)


#: How each kind of block is read, by its exact type.
READERS: dict[type, Callable[[TimmBlock], BlockReader]] = {
    Block: _plain,
    EvaBlock: _plain,
    ResPostBlock: _post_norm,
    EvaBlockPostNorm: _post_norm,
    ParallelThingsBlock: _parallel_things,
    ParallelScalingBlock: _parallel_scaling,
}


def block_fault(block: TimmBlock) -> str:
    """Return why a block cannot be read; "" where it can."""
    if type(block) not in READERS:
        return f"{type(block).__name__} is not a block that is supported"
    if type(block) is ParallelScalingBlock:
        return ""
    if type(block) is ParallelThingsBlock:
        parts = [attention_fault(part.attn) for part in block.attns] + [_mlp_fault(part.mlp) for part in block.ffns]
    else:
        parts = [attention_fault(block.attn), _mlp_fault(block.mlp)]
    return next((part for part in parts if part), "")


def read_block(block: TimmBlock) -> BlockReader:
    """Return the reader of a block in which ``block_fault`` finds no fault."""
    return READERS[type(block)](block)

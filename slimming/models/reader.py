"""The timm families that can be read, and ``ModelReader``, which reads one of their models as embedding, blocks and head."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias, cast

import torch
from timm.layers import PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from patchslim.errors import InputRejected
from patchslim.macs import Geometry
from slimming.models.abilities import Refusals
from slimming.models.attention import AttentionInput, identity_rope
from slimming.models.blocks import BlockReader, block_fault, read_block
from slimming.models.heads import HeadReader, head_fault

Embedding = tuple[Tensor, Tensor | None]
#: The timm models that can be read; their attributes are timm's own.
TimmVit: TypeAlias = VisionTransformer | Eva
FAMILIES: dict[type, Callable[[TimmVit, Tensor], Embedding]] = {}
_POST_NORM: Refusals = {"closed-form": "the blocks end in norms, so they cannot be refitted in closed form"}
#: Families that no static plan of global tokens fits, by timm's class name.
MISFITS = {
    "Beit": "its relative-position bias ties every pair of tokens to their places",
    "VisionTransformerRelPos": "its relative-position bias ties every pair of tokens to their places",
    "SwinTransformer": "its attention is windowed: a window needs all of its tokens",
    "SwinTransformerV2": "its attention is windowed: a window needs all of its tokens",
    "SwinTransformerV2Cr": "its attention is windowed: a window needs all of its tokens",
    "VisionTransformerSAM": "its attention is windowed and has a relative-position bias",
    "Hiera": "its tokens are pooled over windows between stages",
    "HieraDet": "its attention is windowed: a window needs all of its tokens",
    "MaxxVit": "its attention is windowed and has a relative-position bias",
    "MultiScaleVit": "its tokens are pooled over the grid between stages",
    "NaFlexVit": "it takes grids of any size, and a static plan needs one",
}


def family(kind: type) -> Callable[[Callable[[TimmVit, Tensor], Embedding]], Callable[[TimmVit, Tensor], Embedding]]:
    """Register how models of exactly ``kind`` embed images: the first block's input (b, N, d), the patches' rotary table."""

    def register(embed: Callable[[TimmVit, Tensor], Embedding]) -> Callable[[TimmVit, Tensor], Embedding]:
        FAMILIES[kind] = embed
        return embed

    return register


@family(VisionTransformer)
@family(VisionTransformerDistilled)
def _embed_vit(model: VisionTransformer, images: Tensor) -> Embedding:
    """DeiT, AugReg, CLIP (pre-norm), DINOv2, SigLIP and their kin: class token, average or attention pool, registers."""
    return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images)))), None


@family(Eva)
def _embed_eva(model: Eva, images: Tensor) -> Embedding:
    """EVA, EVA-02, DINOv3 and the Perception Encoder: RoPE on the patches, fused or separate q, k and v."""
    tokens, rope = model._pos_embed(model.patch_embed(images))
    return model.norm_pre(tokens), rope


class ModelReader:
    """A supported timm model as embedding, blocks and head: a ``VitReader``. Cheap to make; it copies nothing of ``model``."""

    def __init__(self, model: TimmVit) -> None:
        self.model: TimmVit = model
        self.prefix = int(model.num_prefix_tokens)
        rows, columns = (int(side) for side in model.patch_embed.grid_size)
        self.grid = (rows, columns)
        self.tokens = self.prefix + rows * columns
        self.blocks: list[BlockReader] = [read_block(block) for block in model.blocks]
        self.head = HeadReader(model)

    @property
    def device(self) -> torch.device:
        """The device of the model's parameters."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def refusals(self) -> Refusals:
        """Post-norm blocks have no closed-form refit; anything else can be asked for."""
        return {} if all(block.can_refit for block in self.blocks) else _POST_NORM

    def embed(self, images: Tensor) -> Tensor:
        """Return the first block's input (b, N, d), prefix tokens first, of images (b, 3, h, w)."""
        return FAMILIES[type(self.model)](self.model, images)[0]

    def ropes(self) -> list[Tensor | None]:
        """Return every block's rotary table over all N tokens, (N, c) or (heads, N, c); prefix tokens are not rotated."""
        model = self.model
        if getattr(model, "rope", None) is None:
            return [None] * len(self.blocks)
        rope = model.rope
        table = rope.get_embed() if hasattr(rope, "feat_shape") else rope.get_embed(shape=model.patch_embed.grid_size)
        full = identity_rope(table, self.prefix)
        return [full[block] if model.rope_mixed else full for block in range(len(self.blocks))]

    def view(self, read: Tensor, present: Sequence[int], wanted: Sequence[int] | None, rope: Tensor | None) -> AttentionInput:
        """Return what a block is given: ``read`` (b, n, d) holds the tokens ``present``; it computes ``wanted`` (None: all)."""
        table = rope if rope is None or len(present) == self.tokens else rope[..., list(present), :]
        if wanted is None or len(wanted) == len(present):
            return AttentionInput(read, read, table, table)
        place = {token: position for position, token in enumerate(present)}
        rows = torch.tensor([place[token] for token in wanted], device=read.device)
        return AttentionInput(read, read[:, rows], table, None if table is None else table[..., rows, :])

    def geometry(self) -> Geometry:
        """Return the sizes that MACs are counted with."""
        model, block = self.model, self.blocks[0]
        width = int(model.embed_dim)
        query, key = block.widths
        head, per_token = self.head.macs()
        plain = 2 * width * block.mlp_hidden_dim
        return Geometry(
            embed_dim=width,
            mlp_hidden_dim=block.mlp_hidden_dim,
            patch_macs=int(model.patch_embed.num_patches) * int(model.patch_embed.proj.weight.numel()),
            head_macs=head,
            attn_dim=None if query == width else query,
            key_dim=None if key == query else key,
            mlp_macs=None if block.mlp_macs == plain else block.mlp_macs,
            gate=any(getattr(reader.module, "gate", None) is not None for _, reader in block.attentions),
            packed_qkv=all(reader.packed for _, reader in block.attentions),
            packed_mlp_dim=block.packed_mlp_dim,
            attention_norms=block.norms,
            pool_macs=per_token,
            pool_tokens=len(self.head.tokens) if per_token else 0,
        )


def reader_of(model: nn.Module, name: str = "") -> ModelReader:
    """Return the reader of a timm model, which messages call ``name``.

    Raises ``InputRejected`` naming model and reason where it is not supported.
    """
    check_supported(model, name or type(model).__name__)
    return ModelReader(model)


def check_supported(model: nn.Module, name: str) -> None:
    """Refuse, by name and reason, a model that cannot be slimmed by a static plan, or whose family is unknown.

    Raises ``InputRejected``.
    """
    for reason in _faults(model):
        known = ", ".join(sorted(kind.__name__ for kind in FAMILIES))
        raise InputRejected(f"model {name}: {reason}; supported families are timm's {known}")


def _faults(model: TimmVit) -> Iterator[str]:
    for kind in type(model).__mro__:
        if kind.__name__ in MISFITS:
            yield f"its family {type(model).__name__} cannot be slimmed: {MISFITS[kind.__name__]}"
            return
    if type(model) not in FAMILIES:
        yield f"its family {type(model).__name__} is not supported"
        return
    if fault := head_fault(model):
        yield fault
    if model.dynamic_img_size:
        yield "dynamic_img_size gives every image its own token grid, and a static plan needs one"
    if type(model.patch_embed) is not PatchEmbed:
        yield f"its patch embedding {type(model.patch_embed).__name__} is not supported"
    elif model.patch_embed.proj.in_channels != 3:
        yield f"it takes {model.patch_embed.proj.in_channels} channels, and images are read as RGB"
    elif not model.patch_embed.num_patches:
        yield f"its image of {model.patch_embed.img_size} pixels holds no patch of {model.patch_embed.patch_size}"
    blocks = cast("Sequence[nn.Module]", model.blocks)
    if not len(blocks):
        yield "it has no blocks"
    for index, block in enumerate(blocks):
        if fault := block_fault(block):
            yield f"block {index}: {fault}"
            return
    if len({(reader.widths, reader.mlp_macs) for reader in map(read_block, blocks)}) > 1:
        yield "its blocks differ in size, and the MAC count takes them to be alike"

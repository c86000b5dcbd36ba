"""What the search asks of a Vision Transformer, whichever runtime computes it: ``VitReader``, and a loaded model that has one.

``slimming.models.reader.ModelReader`` (timm) and ``slimming.onnx_models.reader.GraphReader`` (ONNX Runtime) satisfy it.
Shapes: b images, N tokens (prefix tokens first), n of them present, k computed, width d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from patchslim.choices import Layout, Pooling

if TYPE_CHECKING:  # a run from the cache imports the protocols and no torch
    import torch
    from torch import Tensor, nn

    from patchslim.macs import Geometry
    from patchslim.plan import SlimPlan
    from slimming.models.abilities import Refusals
    from slimming.models.attention import AttentionInput


class VitBlock(Protocol):
    """One transformer block on the tokens that it is given."""

    def run(self, given: AttentionInput, /) -> Tensor:
        """Return the block's output at the queried tokens (b, k, d); softmax maps are appended to ``given.sink``, if any."""

    def maps(self, given: AttentionInput, /) -> Tensor:
        """Return the softmax matrices (b, heads, k, n); parallel attentions side by side."""

    def value_norms(self, given: AttentionInput, /) -> Tensor:
        """Return the norms of the values (b, heads, n); parallel attentions side by side."""


class VitHead(Protocol):
    """What follows the last block: norm, pooling and classifier."""

    @property
    def pooling(self) -> Pooling:
        """``token`` (single tokens are read), ``avg`` (a mean) or ``map`` (an attention pool)."""

    @property
    def tokens(self) -> list[int]:
        """The original indices of all tokens that the head reads, ascending."""

    @property
    def fixed(self) -> bool:
        """Whether the head needs every token that it reads; one that pools accepts any non-empty part."""

    @property
    def beside(self) -> list[int]:
        """The tokens that the last block keeps beside those that are pooled, where single tokens are read as well."""

    def logits(self, tokens: Tensor, /) -> Tensor:
        """Return the logits (b, classes) of the tokens that the head is given (b, k, d), in original order."""

    def pooled(self, tokens: Tensor, /) -> Tensor:
        """Return the pooled feature (b, width) of the tokens that the head is given (b, k, d)."""

    def weights(self, tokens: Tensor, /) -> Tensor:
        """Return how the pooled feature depends on each given token (b, k, r): its weight, or a column per needed token."""


class VitReader(Protocol):
    """A dense model as embedding, blocks and head."""

    @property
    def model(self) -> nn.Module:
        """The dense model: images (b, 3, h, w) to logits (b, classes)."""

    @property
    def device(self) -> torch.device:
        """Where images and tokens belong."""

    @property
    def refusals(self) -> Refusals:
        """What cannot be asked of plans for this model, and why."""

    @property
    def tokens(self) -> int:
        """N, prefix tokens included."""

    @property
    def prefix(self) -> int:
        """How many prefix tokens (class token, registers) lead the patches."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""

    @property
    def blocks(self) -> Sequence[VitBlock]:
        """The blocks, first to last."""

    @property
    def head(self) -> VitHead:
        """The head."""

    def embed(self, images: Tensor, /) -> Tensor:
        """Return the first block's input (b, N, d) of images (b, 3, h, w)."""

    def ropes(self) -> list[Tensor | None]:
        """Return every block's rotary table over all N tokens, (N, c) or (heads, N, c); None where there is none to apply."""

    def view(
        self, read: Tensor, present: Sequence[int], wanted: Sequence[int] | None, rope: Tensor | None, /
    ) -> AttentionInput:
        """Return what a block is given: ``read`` (b, n, d) holds the tokens ``present``; it computes ``wanted`` (None: all)."""

    def geometry(self) -> Geometry:
        """Return the sizes that MACs are counted with."""


class LoadedVit(Protocol):
    """A dense model that was loaded, with what a plan and its page record of it."""

    @property
    def architecture(self) -> str:
        """timm's name of the model, or the file's."""

    @property
    def weights(self) -> str:
        """bundled, pretrained, random, or a file's name."""

    @property
    def data_config(self) -> dict[str, Any]:
        """timm's: input_size, interpolation, mean, std, crop_pct, crop_mode."""

    @property
    def reader(self) -> VitReader:
        """The model, read for a search."""

    def slimmed(self, model: nn.Module, plan: SlimPlan, layout: Layout, /) -> nn.Module:
        """Return ``model`` (the dense one, or a refitted copy) cut to ``plan``: images to logits."""

"""What is known of a graph after its images were followed through it: the axes of each tensor, and what was met on the way."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axes import Axes, Batch, Tokens, tokens_in
from graph_passes.analysis.patterns import MatchFailure


@dataclass(frozen=True)
class TokenTable:
    """A constant operand with one row per token on ``axis``: positions, rotary angles, biases between tokens."""

    node: gs.Node
    operand: int
    axis: int
    tokens: Tokens


@dataclass(frozen=True)
class MixingMatrix:
    """A constant ``matrix [k, r]`` by which ``node`` multiplies r ``tokens``, behind ``level`` attentions.

    ``summed``: it is no product, but the last node of sums of rows.
    """

    node: gs.Node
    matrix: NDArray[np.generic]
    tokens: Tokens
    level: int
    summed: bool = False


@dataclass
class Attention:
    """One attention: queries times keys, a Softmax over the keys, times the values; or one ``Attention`` node.

    ``scores`` multiplies queries by keys, ``mix`` multiplies the Softmax by the values; both are the ``Attention`` node where
    there is one, and ``softmax`` is then None. ``level``: how many attentions its input has been through. ``read``: the tokens
    of its keys and values; ``queried``: those of its queries, None where these are no tokens (an attention pool).
    """

    scores: gs.Node
    softmax: gs.Node | None
    mix: gs.Node
    level: int
    read: Tokens
    queried: Tokens | None

    @property
    def queries(self) -> tuple[gs.Node, int]:
        """The node that reads the queries, and which of its inputs they are."""
        return self.scores, 0

    @property
    def keys(self) -> tuple[gs.Node, int]:
        """The node that reads the keys, and which of its inputs they are."""
        return self.scores, 1

    @property
    def values(self) -> tuple[gs.Node, int]:
        """The node that reads the values, and which of its inputs they are."""
        return (self.mix, 2) if self.softmax is None else (self.mix, 1)


@dataclass
class AxisMap:
    """The axes of every tensor that depends on the images, and the attentions and constants that were met.

    Dictionaries go by a tensor's ``id``. ``nodes``: in topological order. ``levels``: how many attentions a tensor has been
    through. ``faults``: tensors that could not be followed, and why. ``softmaxes``: for attention weights, the nodes of their
    scores and of their Softmax. ``prefix``: the names of prefix tokens, in the order in which they are joined.
    """

    nodes: list[gs.Node]
    axes: dict[int, Axes] = field(default_factory=dict)
    levels: dict[int, int] = field(default_factory=dict)
    faults: dict[int, MatchFailure] = field(default_factory=dict)
    tables: list[TokenTable] = field(default_factory=list)
    mixing_matrices: list[MixingMatrix] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    softmaxes: dict[int, tuple[gs.Node, gs.Node]] = field(default_factory=dict)
    prefix: list[int] = field(default_factory=list)
    batch: Batch = field(default_factory=Batch)

    def of(self, tensor: gs.Tensor) -> Axes | None:
        """The axes of a tensor; None where it does not depend on the images or could not be followed."""
        return self.axes.get(id(tensor))

    def tokens(self, tensor: gs.Tensor) -> Tokens | None:
        """The tokens that a tensor holds, on whatever axis; None where it holds none."""
        axes = self.of(tensor)
        return None if axes is None else tokens_in(axes)

    def depends(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor's values depend on the images."""
        return id(tensor) in self.axes or id(tensor) in self.faults

    def level(self, tensor: gs.Tensor) -> int:
        """How many attentions, one behind the other, a tensor has been through."""
        return self.levels.get(id(tensor), 0)

"""Follows the tokens of an image through a graph: one rule per operator says what each axis of its output holds.

Nothing here knows an exporter or a name: a graph is understood as far as its operators are. A tensor that no rule explains
carries the node that stopped it and what was expected there; that matters only where an answer depends on it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axes import (
    MOST_TOKENS,
    Axes,
    Axis,
    Batch,
    Mixed,
    Pixels,
    Tokens,
    broadcast,
    has,
    is_spatial,
    normal,
    size_of,
    tokens_in,
    tokens_of,
)
from graph_passes.analysis.axis_rules import rearranged
from graph_passes.analysis.patterns import MatchFailure, constant, label, one_hot_rows

UNARY = {
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Cos", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "QuickGelu", "Reciprocal", "Relu", "Round", "Selu",
    "Sigmoid", "Sign", "Sin", "Softplus", "Sqrt", "Swish", "Tanh",
}  # fmt: skip
ELEMENTWISE = {"Add", "And", "Div", "Equal", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "PRelu", "Sub", "Sum", "Where"}
NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
OF_MIXED = {"Add", "Cast", "Identity", "Transpose"}  # what may read mixed tokens


@dataclass(frozen=True)
class Table:
    """A constant operand with one row per token on ``axis``: positions, rotary angles, biases between tokens."""

    node: gs.Node
    operand: int
    axis: int
    tokens: Tokens


@dataclass(frozen=True)
class Mix:
    """A constant ``matrix [k, r]`` times r ``tokens``, after ``level`` attentions."""

    node: gs.Node
    matrix: NDArray[np.generic]
    tokens: Tokens
    level: int


@dataclass
class Attention:
    """One attention: queries times keys, a Softmax over the keys, times the values; or one ``Attention`` node.

    ``queries``, ``keys``, ``values`` are ``(node, operand)``. ``softmax`` is None for an ``Attention`` node.
    ``level``: how many attentions its input has been through. ``queried`` is None where the queries are no tokens (a pool).
    """

    scores: gs.Node
    softmax: gs.Node | None
    mix: gs.Node
    level: int
    read: Tokens
    queried: Tokens | None

    @property
    def queries(self) -> tuple[gs.Node, int]:
        """Where the queries go in."""
        return self.scores, 0

    @property
    def keys(self) -> tuple[gs.Node, int]:
        """Where the keys go in."""
        return self.scores, 1

    @property
    def values(self) -> tuple[gs.Node, int]:
        """Where the values go in."""
        return (self.mix, 2) if self.softmax is None else (self.mix, 1)


@dataclass
class Labels:
    """The axes of every tensor that depends on the images, by the tensor's identity."""

    nodes: list[gs.Node]
    axes: dict[int, Axes] = field(default_factory=dict)
    levels: dict[int, int] = field(default_factory=dict)  # attentions that a tensor has been through
    faults: dict[int, MatchFailure] = field(default_factory=dict)  # tensors that could not be followed, and why
    tables: list[Table] = field(default_factory=list)
    mixes: list[Mix] = field(default_factory=list)
    attentions: list[Attention] = field(default_factory=list)
    weights: dict[int, tuple[gs.Node, gs.Node]] = field(default_factory=dict)  # (scores, Softmax) behind attention weights
    prefix: list[int] = field(default_factory=list)  # prefix tokens, in the order in which they are joined
    batch: Batch = field(default_factory=Batch)

    def of(self, tensor: gs.Tensor) -> Axes | None:
        """The axes of a tensor; None where it does not depend on the images or could not be followed."""
        return self.axes.get(id(tensor))

    def tokens(self, tensor: gs.Tensor) -> Tokens | None:
        """The tokens that a tensor holds, if any."""
        axes = self.of(tensor)
        return None if axes is None else tokens_in(axes)

    def depends(self, tensor: gs.Tensor) -> bool:
        """Whether a tensor's values depend on the images."""
        return id(tensor) in self.axes or id(tensor) in self.faults

    def level(self, tensor: gs.Tensor) -> int:
        """How many attentions, one behind the other, a tensor has been through."""
        return self.levels.get(id(tensor), 0)


def follow(graph: gs.Graph, nodes: list[gs.Node], images: gs.Variable) -> Labels:
    """Follow ``images`` through ``nodes`` (in topological order; constants folded); raises ``MatchFailure`` for the images."""
    labels = Labels(nodes)
    labels.axes[id(images)] = _of_images(labels, images)
    for node in nodes:
        captured = [tensor for tensor in _captured(node) if labels.depends(tensor)]
        if node.op in ("Shape", "Size") or not any(labels.depends(tensor) for tensor in [*node.inputs, *captured]):
            continue
        level = max(labels.level(tensor) for tensor in [*node.inputs, *captured])
        fault = next((labels.faults[id(tensor)] for tensor in node.inputs if id(tensor) in labels.faults), None)
        if captured:
            fault = MatchFailure(label(node), "expected no subgraph that reads what is computed of the images")
        try:
            outputs = _explained(labels, node) if fault is None else []
        except MatchFailure as failure:
            fault, outputs = failure, []
        for number, tensor in enumerate(node.outputs):
            labels.levels[id(tensor)] = level
            if number < len(outputs):
                labels.axes[id(tensor)] = outputs[number]
            else:
                labels.faults[id(tensor)] = fault or MatchFailure(label(node), "expected its first output to be read only")
        _close_attention(labels, node, level)
    return labels


def _captured(node: gs.Node) -> list[gs.Tensor]:
    """The tensors that the node's subgraphs read, those of the graph around them among them."""
    graphs = [value for value in node.attrs.values() if isinstance(value, gs.Graph)]
    return [tensor for graph in graphs for inner in graph.nodes for tensor in [*inner.inputs, *_captured(inner)]]


def _of_images(labels: Labels, images: gs.Variable) -> Axes:
    shape = list(images.shape or [])
    channels = [axis for axis in (1, 3) if len(shape) == 4 and shape[axis] in (1, 3, 4)]
    sides = [axis for axis in (1, 2, 3) if not channels or axis != channels[0]]
    if len(shape) != 4 or not channels or not all(isinstance(shape[axis], int) for axis in sides):
        expected = f"expected images [batch, channels, height, width] of a fixed size; its shape is {shape}"
        if len(shape) == 4 and any(isinstance(length, str) for length in shape[1:]):
            expected += "; give the size with --image-size"
        raise MatchFailure(f"graph input '{images.name}'", expected)
    labels.batch = Batch(shape[0]) if isinstance(shape[0], int) else Batch()
    result: list[Axis] = [(labels.batch,), (), (), ()]
    result[channels[0]] = (shape[channels[0]],)
    for number, axis in enumerate(sides):
        result[axis] = (Pixels(number, shape[axis]),)
    return tuple(result)


def _explained(labels: Labels, node: gs.Node) -> list[Axes]:
    """The axes of a node's outputs; raises ``MatchFailure`` where no rule explains them."""
    inputs = [labels.of(tensor) for tensor in node.inputs]
    site = label(node)
    if node.domain not in (None, "", "ai.onnx"):
        raise MatchFailure(site, f"expected operators of ONNX's own; this one is of '{node.domain}'")
    first = inputs[0] if inputs else None
    if node.op not in OF_MIXED and any(has(axis, Mixed) for axes in inputs for axis in axes or ()):
        raise MatchFailure(site, "expected tokens that a constant matrix mixes to be added to as many others")
    if node.op in UNARY and first is not None:
        return [_same_weights(labels, node, first)]
    if node.op in ELEMENTWISE:
        return [_elementwise(labels, node)]
    if node.op in ("MatMul", "Gemm"):
        return [_product(labels, node)]
    if node.op == "Attention":
        return [_attention(labels, node)]
    if node.op in NORMS and first is not None:
        axis = int(node.attrs.get("axis", -1)) % len(first)
        _ensure_apart(first[axis:], site, "a norm over features")
        return [first]
    if node.op in ("Softmax", "LogSoftmax") and first is not None:
        return [_softmax(labels, node, first)]
    if node.op == "Concat":
        return [_concat(labels, node)]
    if first is not None and not any(is_spatial(axis) for axes in inputs if axes is not None for axis in axes):
        return [_by_shape(tensor, labels) for tensor in node.outputs]
    if first is None:
        raise MatchFailure(site, "expected the images or what is computed of them as its first input")
    outputs = rearranged(node, first)
    if outputs is not None:
        return outputs
    raise MatchFailure(site, "expected an operator that keeps tokens apart, or an attention")


def _same_weights(labels: Labels, node: gs.Node, axes: Axes) -> Axes:
    for tensor in node.inputs:
        if id(tensor) in labels.weights:
            labels.weights[id(node.outputs[0])] = labels.weights[id(tensor)]
    return axes


def _elementwise(labels: Labels, node: gs.Node) -> Axes:
    """Operands side by side; a constant with one row per token becomes a table."""
    inputs = _absorbed([labels.of(tensor) for tensor in node.inputs])
    computed = broadcast([axes for axes in inputs if axes is not None], label(node))
    operands = [computed]
    for index, tensor in enumerate(node.inputs):
        if inputs[index] is not None:
            continue
        shape = list(tensor.shape if constant(tensor) is None else _dims(tensor))
        axes: list[Axis] = []
        for place, length in enumerate(shape):
            beside = place - len(shape) + len(computed)
            axis = computed[beside] if beside >= 0 else ()
            if isinstance(length, int) and length == size_of(axis) and length > 1:
                if (tokens := tokens_of(axis)) is not None:
                    if constant(tensor) is None:
                        raise MatchFailure(label(node), f"expected constants for each token; '{tensor.name}' is computed")
                    labels.tables.append(Table(node, index, place, tokens))
                elif has(axis, Tokens):
                    raise MatchFailure(label(node), "expected constants for each token on an axis of their own")
                axes.append(axis)
            else:
                axes.append((length,) if isinstance(length, int) and length > 1 else ())
        operands.append(tuple(axes))
    return _same_weights(labels, node, broadcast(operands, label(node)))


def _absorbed(operands: list[Axes | None]) -> list[Axes | None]:
    """The operands of a node, where one is of mixed tokens and the other of as many named ones: both are of those."""
    first, second = operands if len(operands) == 2 else (None, None)
    if first is None or second is None or len(first) != len(second):
        return operands
    pairs = list(zip(first, second, strict=True))
    return [tuple(_named_one(*pair) for pair in pairs), tuple(_named_one(*pair[::-1]) for pair in pairs)]


def _named_one(axis: Axis, other: Axis) -> Axis:
    return other if has(axis, Mixed) and tokens_of(other) is not None and size_of(axis) == size_of(other) else axis


def _dims(tensor: gs.Tensor) -> tuple[int, ...]:
    if isinstance(tensor, gs.Constant):
        return tuple(tensor.shape)
    value = constant(tensor)
    assert value is not None
    return value.shape


def _product(labels: Labels, node: gs.Node) -> Axes:
    """A linear layer, an attention's scores or mix, or the choice of rows by a one-hot matrix."""
    site, (left, right) = label(node), (labels.of(node.inputs[0]), labels.of(node.inputs[1]))
    if node.op == "Gemm" and (right is not None or node.attrs.get("transA", 0)):
        raise MatchFailure(site, "expected a constant second factor, and the first one as it is")
    if left is not None and right is None:
        if constant(node.inputs[1]) is None:
            raise MatchFailure(site, "expected constant weights")
        shape = _dims(node.inputs[1])
        _ensure_apart([left[-1]], site, "features times weights; these mix tokens or images")
        width = shape[0] if node.op == "Gemm" and node.attrs.get("transB", 0) else shape[-1]
        outer = broadcast([left[:-2], tuple(normal([length]) for length in shape[:-2])], site)
        return (*outer, *left[-2:-1], normal([width]))
    if right is None:
        raise MatchFailure(site, "expected the images or what is computed of them")
    if left is None:
        return _constant_times(labels, node, right)
    inner, other = left[-1], right[-2]
    outer = broadcast([left[:-2], right[:-2]], site)
    if has(inner, Tokens):
        behind, tokens, values = labels.weights.get(id(node.inputs[0])), tokens_of(inner), tokens_of(other)
        if behind is None or tokens is None or values is None or tokens.names != values.names:
            raise MatchFailure(site, "expected attention weights (a Softmax) over the tokens times their values")
    elif inner != other or is_spatial(inner):
        raise MatchFailure(site, "expected queries and keys of one width")
    else:
        keys = tokens_of(right[-1])
        if keys is not None:
            right = (*right[:-1], (replace(keys, keys=True),))
    return (*outer, left[-2], right[-1])


def _constant_times(labels: Labels, node: gs.Node, right: Axes) -> Axes:
    """A constant times what is computed: chosen rows, or the scores of constant queries, as in an attention pool."""
    matrix, tokens = constant(node.inputs[0]), tokens_of(right[-2])
    if matrix is None:
        matrix_shape = node.inputs[0].shape or []
        if tokens is None and len(matrix_shape) > 1 and isinstance(matrix_shape[-2], int):
            return (*right[:-2], normal([matrix_shape[-2]]), _as_keys(right[-1]))
        raise MatchFailure(label(node), "expected a constant first factor")
    if tokens is None:
        return (*right[:-2], normal([matrix.shape[-2]]) if matrix.ndim > 1 else (), _as_keys(right[-1]))
    rows = one_hot_rows(matrix)
    if rows is None:
        if matrix.ndim != 2:
            raise MatchFailure(label(node), "expected tokens to be chosen or mixed by one matrix")
        labels.mixes.append(Mix(node, matrix, tokens, labels.level(node.inputs[1])))
        return (*right[:-2], (Mixed(matrix.shape[0]),), right[-1])
    return (*right[:-2], (Tokens(tuple(tokens.names[row] for row in rows)),), right[-1])


def _as_keys(axis: Axis) -> Axis:
    tokens = tokens_of(axis)
    return axis if tokens is None else (replace(tokens, keys=True),)


def _softmax(labels: Labels, node: gs.Node, axes: Axes) -> Axes:
    axis = int(node.attrs.get("axis", -1)) % len(axes)
    if not is_spatial(axes[axis]):
        return axes
    tokens = tokens_of(axes[axis])
    if tokens is None or not tokens.keys or axis != len(axes) - 1 or node.op != "Softmax":
        raise MatchFailure(label(node), "expected a Softmax over the tokens that an attention reads, on the last axis")
    labels.weights[id(node.outputs[0])] = (_scores_behind(labels, node), node)
    return axes


def _scores_behind(labels: Labels, softmax: gs.Node) -> gs.Node:
    """The product of queries and keys that a Softmax weighs."""
    node = softmax
    while node.op != "MatMul":
        computed = [tensor for tensor in node.inputs if labels.depends(tensor)]
        if len(computed) != 1 or not computed[0].inputs:
            raise MatchFailure(label(node), "expected one product of queries and keys before the Softmax")
        node = computed[0].inputs[0]
    return node


def _attention(labels: Labels, node: gs.Node) -> Axes:
    """ONNX's ``Attention`` (opset 23), on ``[B, heads, n, width]`` or ``[B, n, heads * width]``."""
    site, (queries, keys, values) = label(node), (labels.of(tensor) for tensor in node.inputs[:3])
    present = [tensor for tensor in node.inputs[4:] if tensor.name]
    if queries is None or keys is None or values is None or present or node.attrs.get("is_causal", 0):
        raise MatchFailure(site, "expected queries, keys and values of tokens, with neither a cache nor a causal mask")
    read, tokens = tokens_of(keys[-2]), tokens_of(values[-2])
    if read is None or tokens != read or len(queries) != len(keys):
        raise MatchFailure(site, "expected keys and values of the same tokens, on the axis before the last")
    if len(node.inputs) > 3 and (mask := constant(node.inputs[3])) is not None:
        for place, held in ((mask.ndim - 2, tokens_of(queries[-2])), (mask.ndim - 1, replace(read, keys=True))):
            if held is not None and mask.shape[place] == held.size > 1:
                labels.tables.append(Table(node, 3, place, held))
    elif len(node.inputs) > 3 and node.inputs[3].name:
        raise MatchFailure(site, "expected a constant mask")
    if len(queries) == 4:
        return (*queries[:-1], values[-1])
    heads = node.attrs.get("q_num_heads", 0) // (node.attrs.get("kv_num_heads", 0) or 1)
    return (*queries[:-1], normal([size_of(values[-1]) * max(heads, 1)]))


def _concat(labels: Labels, node: gs.Node) -> Axes:
    """Parts one behind the other; constants that join tokens are prefix tokens."""
    found = [labels.of(tensor) for tensor in node.inputs]
    rank = next(len(axes) for axes in found if axes is not None)
    place = int(node.attrs["axis"]) % rank
    images = {index for axes in found if axes is not None for index, axis in enumerate(axes) if axis == (labels.batch,)}
    parts = [
        axes if axes is not None else _by_shape(tensor, labels, images) for axes, tensor in zip(found, node.inputs, strict=True)
    ]
    others = [(*axes[:place], (), *axes[place + 1 :]) for axes in parts]
    result = broadcast(others, label(node))
    along = [axes[place] for axes in parts]
    if not any(is_spatial(axis) or has(axis, Batch) for axis in along):
        return (*result[:place], normal([sum(size_of(axis) for axis in along)]), *result[place + 1 :])
    names: list[int] = []
    for axis, axes in zip(along, found, strict=True):
        tokens = tokens_of(axis)
        if tokens is None and axes is None and not has(axis, Batch) and size_of(axis) < MOST_TOKENS:
            fresh = [-1 - len(labels.prefix) - number for number in range(size_of(axis))]
            labels.prefix.extend(fresh)
            names.extend(fresh)
        elif tokens is not None:
            names.extend(tokens.names)
        else:
            raise MatchFailure(label(node), "expected tokens, or constant prefix tokens, to be joined")
    return (*result[:place], (Tokens(tuple(names)),), *result[place + 1 :])


def _by_shape(tensor: gs.Tensor, labels: Labels, images: Collection[int] = ()) -> Axes:
    """The axes of a tensor that holds no token, by its shape alone: what is not known is the batch.

    ``images``: axes where the batch is to be expected, for a graph of a fixed one.
    """
    shape = (_dims(tensor) if constant(tensor) is not None else tensor.shape) or []
    batch = [
        not isinstance(length, int) or (length == labels.batch.size and place in images) for place, length in enumerate(shape)
    ]
    return tuple((labels.batch,) if known else normal([length]) for known, length in zip(batch, shape, strict=True))


def _ensure_apart(axes: Sequence[Axis], site: str, what: str) -> None:
    if any(is_spatial(axis) or has(axis, Batch) for axis in axes):
        raise MatchFailure(site, f"expected {what}")


def _close_attention(labels: Labels, node: gs.Node, level: int) -> None:
    """Note the attention that ``node`` ends, and that what follows has been through one more."""
    behind = labels.weights.get(id(node.inputs[0])) if node.op == "MatMul" else None
    if id(node.outputs[0]) in labels.faults or (behind is None and node.op != "Attention"):
        return
    axes = labels.of(node.outputs[0])
    scores, softmax = behind or (node, None)
    read = labels.tokens(node.inputs[1])  # of an Attention node the keys, of a mix the values
    if axes is None or read is None:
        return
    queried = tokens_in(axes)
    labels.attentions.append(Attention(scores, softmax, node, level, read, queried))
    labels.levels[id(node.outputs[0])] = level + 1

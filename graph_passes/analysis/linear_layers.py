"""Linear layers, and where the columns of their outputs go: what packs and unpacks queries, keys and values only moves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from graph_passes.analysis.axes import Batch, Tokens, has, token_axis
from graph_passes.analysis.axis_map import AxisMap
from graph_passes.analysis.operators import DATA_MOVEMENT_OPS
from graph_passes.analysis.patterns import computed_and_constant, constant_value, integers, rows_of_slice
from graph_passes.node_builder import make_constant


@dataclass
class Linear:
    """``source [..., in] @ weight [in, out] + bias [out]``: a Gemm, or a MatMul and, where there is a bias, an Add."""

    source: gs.Tensor
    product: gs.Node
    add: gs.Node | None
    weight: NDArray[np.generic]
    bias: NDArray[np.generic] | None

    @property
    def output(self) -> gs.Variable:
        """The tensor ``[..., out]``."""
        return (self.add or self.product).outputs[0]


def linear_at(tensor: gs.Tensor) -> Linear | None:
    """The linear layer whose output is ``tensor``; None where it is not the output of one."""
    node = tensor.inputs[0] if tensor.inputs else None
    add, bias = None, None
    if (
        node is not None
        and node.op == "Add"
        and (parts := computed_and_constant(node)) is not None
        and parts[1].shape[-1:] == (parts[1].size,)
    ):
        add, (source, bias) = node, parts
        node = source.inputs[0] if source.inputs and len(source.outputs) == 1 else None
    if node is None or node.op not in ("MatMul", "Gemm") or (add is not None and node.op == "Gemm"):
        return None
    weight = constant_value(node.inputs[1])
    if weight is None or weight.ndim != 2 or constant_value(node.inputs[0]) is not None:
        return None
    if node.op == "Gemm":
        if node.attrs.get("transA", 0) or node.attrs.get("alpha", 1.0) != 1.0 or node.attrs.get("beta", 1.0) != 1.0:
            return None
        weight = weight.T if node.attrs.get("transB", 0) else weight
        bias = constant_value(node.inputs[2]) if len(node.inputs) > 2 else None
        if len(node.inputs) > 2 and (bias is None or bias.size != weight.shape[1]):
            return None
    return Linear(node.inputs[0], node, add, weight, None if bias is None else bias.reshape(-1))


def set_weight(linear: Linear, name: str, weight: NDArray[np.generic]) -> None:
    """Give a linear layer a new constant ``name``: ``weight [in, out]``."""
    transposed = linear.product.op == "Gemm" and linear.product.attrs.get("transB", 0)
    linear.product.inputs[1] = make_constant(name, weight.T if transposed else weight)


def set_bias(linear: Linear, name: str, bias: NDArray[np.generic]) -> None:
    """Give a linear layer that has a bias a new constant ``name``: ``bias [out]``."""
    if linear.add is None:
        linear.product.inputs[2] = make_constant(name, bias)
        return
    index = next(i for i, tensor in enumerate(linear.add.inputs) if tensor is not linear.product.outputs[0])
    linear.add.inputs[index] = make_constant(name, bias)


@dataclass
class Columns:
    """Columns of a linear layer's output in ``tensor``, which moves alone made of it.

    ``values`` is shaped like the tensor for one image, and holds at each place the number of the column that is there.
    """

    linear: Linear
    tensor: gs.Tensor
    values: NDArray[np.int64]

    def of_one_token(self, axis_map: AxisMap) -> NDArray[np.int64] | None:
        """The column numbers of one token, without the axes of tokens and batch.

        None where they differ between tokens, or tokens or batch share an axis with anything else.
        """
        axes = axis_map.of(self.tensor)
        place = None if axes is None else token_axis(axes)
        if axes is None or place is None or any(len(axis) > 1 and has(axis, Tokens, Batch) for axis in axes):
            return None
        one = self.values.take([0], axis=place)
        if not (self.values == one).all():
            return None
        gone = tuple(index for index, axis in enumerate(axes) if has(axis, Tokens, Batch))
        return one.squeeze(axis=gone)


def columns_of(tensor: gs.Tensor, axis_map: AxisMap) -> Columns | None:
    """The columns of a linear layer that ``tensor`` holds; None where anything but moves lies between the two."""
    path: list[tuple[gs.Node, gs.Tensor]] = []
    current = tensor
    while (linear := linear_at(current)) is None:
        node = current.inputs[0] if current.inputs else None
        if node is None or node.op not in DATA_MOVEMENT_OPS or axis_map.of(current) is None:
            return None
        path.append((node, current))
        current = node.inputs[0]
    shape = shape_for_one_image(axis_map, current)
    if shape is None or axis_map.tokens(current) is None:
        return None
    values = np.broadcast_to(np.arange(shape[-1]), shape)
    for node, output in reversed(path):
        after = moved(node, output, values, axis_map)
        if after is None:
            return None
        values = after
    return Columns(linear, tensor, values)


def column_numbers(columns: Sequence[Columns]) -> NDArray[np.int64]:
    """The numbers of all these columns, each once, in ascending order."""
    return np.unique(np.concatenate([found.values.reshape(-1) for found in columns])) if columns else np.arange(0)


def back_to_roots(columns: Sequence[Columns], axis_map: AxisMap) -> tuple[list[Columns], list[gs.Node]]:
    """The tensors, nearest to the layer, that hold these columns and no others; and the moves between them and ``columns``."""
    whole = set(column_numbers(columns).tolist())
    roots: dict[int, Columns] = {}
    passed: list[gs.Node] = []
    for found in columns:
        root = found
        while root.tensor.inputs and root.tensor.inputs[0].op in DATA_MOVEMENT_OPS:
            before = columns_of(root.tensor.inputs[0].inputs[0], axis_map)
            if before is None or not set(column_numbers([before]).tolist()) <= whole:
                break
            passed.append(root.tensor.inputs[0])
            root = before
        roots[id(root.tensor)] = root
    return list(roots.values()), passed


def projection_outputs(axis_map: AxisMap, operand: tuple[gs.Node, int]) -> list[Columns]:
    """The tensors, nearest to their layer, that hold nothing but the columns which feed an attention's ``(node, input)``."""
    node, index = operand
    found: dict[int, Columns] = {}
    pending, seen = [node.inputs[index]], set()
    while pending:
        tensor = pending.pop()
        if id(tensor) in seen or not axis_map.depends(tensor) or axis_map.tokens(tensor) is None:
            continue
        seen.add(id(tensor))
        columns = columns_of(tensor, axis_map)
        if columns is not None:
            found[id(tensor)] = columns
        elif tensor.inputs and tensor.inputs[0].op != "LayerNormalization":
            pending.extend(tensor.inputs[0].inputs)
        elif tensor.inputs:
            pending.append(tensor.inputs[0].inputs[0])
    return back_to_roots(list(found.values()), axis_map)[0]


def shape_for_one_image(axis_map: AxisMap, tensor: gs.Tensor) -> tuple[int, ...] | None:
    """A tensor's shape for one image; None where its axes are not known."""
    axes = axis_map.of(tensor)
    if axes is None:
        return None
    sizes = [[1 if isinstance(f, Batch) else f if isinstance(f, int) else f.size for f in axis] for axis in axes]
    return tuple(int(np.prod(size)) for size in sizes)


def moved(node: gs.Node, output: gs.Tensor, values: NDArray[np.int64], axis_map: AxisMap) -> NDArray[np.int64] | None:
    """What the move ``node`` makes of ``values``, shaped like its input for one image; None where that is not known."""
    if node.op == "Transpose":
        return values.transpose(node.attrs.get("perm"))
    if node.op == "Gather":
        index = constant_value(node.inputs[1])
        return None if index is None else values.take(index.astype(np.int64), axis=node.attrs.get("axis", 0))
    if node.op == "Slice":
        bounds = rows_of_slice(node, values.shape) or {}
        for axis, rows in bounds.items():
            values = values.take(list(rows), axis=axis)
        return values if bounds else None
    if node.op == "Split":
        axis, count = int(node.attrs.get("axis", 0)), len(node.outputs)
        sizes = integers(node.inputs[1]) if len(node.inputs) > 1 else [-(-values.shape[axis] // count)] * count
        parts = np.split(values, np.cumsum(sizes or [])[:-1], axis=axis)
        return parts[next(number for number, tensor in enumerate(node.outputs) if tensor is output)]
    shape = shape_for_one_image(axis_map, output)
    return None if shape is None else values.reshape(shape)

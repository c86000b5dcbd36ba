"""Writes an Einsum of two operands as Transposes, Reshapes and one product of matrices.

Keras and JAX write their attentions so, and keep the heads as an axis of the weights: ``abc,cde->abde`` is a linear layer whose
weights ``[c, d, e]`` are those of ``d`` heads, ``bqhd,bkhd->bhqk`` the scores of an attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import onnx
from onnx import helper

#: Letters that stand for the axes of an ellipsis.
_ELLIPSIS = "0123456789"


@dataclass
class _Nodes:
    """The nodes that replace one Einsum, and the constants that they need."""

    name: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def op(self, op: str, inputs: Sequence[str], **attributes: object) -> str:
        output = f"{self.name}.{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=output, **attributes))
        return output

    def transposed(self, tensor: str, order: Sequence[int]) -> str:
        return tensor if list(order) == sorted(order) else self.op("Transpose", [tensor], perm=list(order))

    def reshaped(self, tensor: str, shape: Sequence[int]) -> str:
        name = f"{self.name}.shape_{len(self.constants)}"
        self.constants.append(helper.make_tensor(name, onnx.TensorProto.INT64, [len(shape)], list(shape)))
        return self.op("Reshape", [tensor, name])


def expand_einsums(model: onnx.ModelProto, weights: Mapping[str, Sequence[int]]) -> tuple[onnx.ModelProto, int]:
    """A copy with its Einsum nodes written out, and how many; those of another form stay. ``model`` has its shapes inferred.

    ``weights``: shapes of the initializers that are not in the model.
    """
    graph = model.graph
    shapes: dict[str, list[int | None]] = {name: list(shape) for name, shape in weights.items()}
    shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    constants = set(shapes)
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.name not in shapes and value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    result, count = onnx.ModelProto(), 0
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:]
    taken = {name for node in graph.node for name in (*node.input, *node.output, node.name)} | constants
    for number, node in enumerate(graph.node):
        found = _written_out(node, shapes, constants, _free_name(node, number, taken)) if node.op_type == "Einsum" else None
        if found is None:
            result.graph.node.append(node)
            continue
        found.nodes[-1].output[0] = node.output[0]
        result.graph.node.extend(found.nodes)
        result.graph.initializer.extend(found.constants)
        count += 1
    return result, count


def _free_name(node: onnx.NodeProto, number: int, taken: set[str]) -> str:
    name = str(node.name or node.output[0])
    while any(other.startswith(f"{name}.") for other in taken):
        name = f"{name}_{number}"
    return name


def _terms(node: onnx.NodeProto, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """The letters of each operand's axes and of the result's, ellipses written out; None where they cannot be told."""
    text = next((entry.s.decode() for entry in node.attribute if entry.name == "equation"), "").replace(" ", "")
    before, arrow, result = text.partition("->")
    terms = before.split(",")
    if len(terms) != len(ranks):
        return None
    longest = 0
    for index, (term, rank) in enumerate(zip(terms, ranks, strict=True)):
        if "..." in term:
            count = rank - len(term.replace("...", ""))
            if not 0 <= count <= len(_ELLIPSIS):
                return None
            longest = max(longest, count)
            terms[index] = term.replace("...", _ELLIPSIS[len(_ELLIPSIS) - count :])
    if not arrow:  # NumPy's rule: letters that are there once, in alphabetical order
        letters = "".join(terms)
        result = ("..." if "..." in before else "") + "".join(
            sorted({letter for letter in letters if letters.count(letter) == 1 and letter not in _ELLIPSIS})
        )
    return terms, result.replace("...", _ELLIPSIS[len(_ELLIPSIS) - longest :])


def _written_out(
    node: onnx.NodeProto, shapes: Mapping[str, Sequence[int | None]], constants: set[str], name: str
) -> _Nodes | None:
    if any(operand not in shapes for operand in node.input):
        return None
    found = _terms(node, [len(shapes[operand]) for operand in node.input])
    if found is None:
        return None
    terms, result = found
    sound = all(len(set(term)) == len(term) for term in (*terms, result))
    if not sound or any(len(shapes[operand]) != len(term) for operand, term in zip(node.input, terms, strict=True)):
        return None
    nodes = _Nodes(name)
    if len(terms) == 1:
        if set(terms[0]) != set(result):
            return None
        nodes.op("Transpose", [node.input[0]], perm=[terms[0].index(letter) for letter in result])
        return nodes
    if len(terms) != 2:
        return None
    operands = list(node.input)
    computed = [operand not in constants for operand in operands]
    rows = [
        min((result.find(letter) for letter in term if letter not in other), default=-1) for term, other in (terms, terms[::-1])
    ]
    # Weights come second, as linear layers have them; else what the result has first, as queries before keys.
    if computed[0] < computed[1] or (all(computed) and rows[1] < rows[0]):
        operands.reverse()
        terms.reverse()
    return nodes if _product(nodes, operands, terms, result, shapes) else None


def _product(
    nodes: _Nodes, operands: list[str], terms: list[str], result: str, shapes: Mapping[str, Sequence[int | None]]
) -> bool:
    """Write two operands' Einsum as one MatMul; returns whether it could be done."""
    first, second = terms
    shared = [letter for letter in first if letter in second]
    batch = [letter for letter in shared if letter in result]
    summed = [letter for letter in shared if letter not in result]
    left = [letter for letter in first if letter not in second]
    right = [letter for letter in second if letter not in first]
    lengths: dict[str, int | None] = {}
    for operand, term in zip(operands, terms, strict=True):
        for letter, length in zip(term, shapes[operand], strict=True):
            lengths[letter] = lengths.get(letter) or length
    known = {letter: length for letter, length in lengths.items() if length is not None}
    reshaped = len(summed) > 1 or len(right) != 1
    if not summed or set(result) != {*batch, *left, *right} or (batch and (len(left) != 1 or len(right) != 1)):
        return False
    if reshaped and not all(letter in known for letter in (*summed, *right)):
        return False
    one = nodes.transposed(operands[0], [first.index(letter) for letter in (*batch, *left, *summed)])
    other = nodes.transposed(operands[1], [second.index(letter) for letter in (*batch, *summed, *right)])
    kept = len(batch) + len(left)
    if len(summed) > 1:
        one = nodes.reshaped(one, [*[0] * kept, -1])
    if reshaped:
        rows = [0] * len(batch) + [prod(known[letter] for letter in summed)]
        other = nodes.reshaped(other, [*rows, prod(known[letter] for letter in right)])
    tensor = nodes.op("MatMul", [one, other])
    if len(right) != 1:
        tensor = nodes.reshaped(tensor, [*[0] * kept, *(known[letter] for letter in right)])
    order = [*batch, *left, *right]
    nodes.transposed(tensor, [order.index(letter) for letter in result])
    return True

"""Adds nodes and constants to a graph, and moves readers from one tensor to another: how every pass changes a graph.

Names are made from a scope, so equal graphs get equal names. Where the model already uses such a name,
``onnx_io.graph_convert.export_model`` numbers the new one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import DTypeLike, NDArray


class NodeBuilder:
    """Appends nodes to ``graph`` under one name.

    A node is called ``SCOPE.NAME`` (the scope itself where the name is empty), its output ``SCOPE.NAME.out``. Outputs have the
    type ``dtype`` unless a call says otherwise; None: not known before shapes are inferred anew. ``output`` is the ending of a
    single output's name.
    """

    def __init__(self, graph: gs.Graph, scope: str, dtype: DTypeLike | None = None, *, output: str = "out") -> None:
        self.graph, self.scope, self.dtype, self.output = graph, scope, dtype, output

    def within(self, name: str) -> NodeBuilder:
        """A builder for the same graph whose scope is ``SCOPE.NAME``."""
        return NodeBuilder(self.graph, self.name_of(name), self.dtype, output=self.output)

    def name_of(self, name: str) -> str:
        """The full name of a node or constant."""
        return f"{self.scope}.{name}" if name else self.scope

    def op(
        self,
        op_type: str,
        inputs: Sequence[gs.Tensor],
        attributes: Mapping[str, object] | None = None,
        *,
        name: str = "",
        output: gs.Variable | str | None = None,
        dtype: DTypeLike | None = None,
        first: bool = False,
    ) -> gs.Variable:
        """Add a node with one output, and return the output.

        ``output``: a tensor that becomes the output, or the full name of a new one. ``first``: put the node before all others,
        rather than behind them; it decides where the sorted graph has it, not whether the graph is valid.
        """
        node_name = self.name_of(name)
        if not isinstance(output, gs.Variable):
            output = gs.Variable(output or f"{node_name}.{self.output}", dtype=self.dtype if dtype is None else dtype)
        self._insert(gs.Node(op_type, node_name, dict(attributes or {}), list(inputs), [output]), first)
        return output

    def op_multi_output(
        self,
        op_type: str,
        inputs: Sequence[gs.Tensor],
        attributes: Mapping[str, object] | None = None,
        *,
        num_outputs: int,
        name: str = "",
    ) -> list[gs.Variable]:
        """Add a node with ``num_outputs`` outputs, called ``SCOPE.NAME.out_0`` and so on, and return them."""
        node_name = self.name_of(name)
        outputs = [gs.Variable(f"{node_name}.out_{number}", dtype=self.dtype) for number in range(num_outputs)]
        self._insert(gs.Node(op_type, node_name, dict(attributes or {}), list(inputs), outputs), False)
        return outputs

    def constant(self, name: str, values: NDArray[np.generic] | Sequence[int]) -> gs.Constant:
        """An initializer ``SCOPE.NAME``; see ``make_constant``."""
        return make_constant(self.name_of(name), values)

    def _insert(self, node: gs.Node, first: bool) -> None:
        self.graph.nodes.insert(0 if first else len(self.graph.nodes), node)


def make_constant(name: str, values: NDArray[np.generic] | Sequence[int]) -> gs.Constant:
    """A new initializer; Python integers become int64. Weights are never changed in place: exporters share them."""
    array = values if isinstance(values, np.ndarray) else np.asarray(values, dtype=np.int64)
    return gs.Constant(name, np.array(array, order="C"))  # ascontiguousarray would make a scalar one-dimensional


def replace_input(node: gs.Node, old: gs.Tensor, new: gs.Tensor) -> None:
    """Let ``node`` read ``new`` wherever it reads ``old``."""
    for index, tensor in enumerate(node.inputs):
        if tensor is old:
            node.inputs[index] = new


def replace_all_uses(old: gs.Tensor, new: gs.Tensor, readers: Sequence[gs.Node] | None = None) -> None:
    """Let the nodes that read ``old`` (or only ``readers``) read ``new``; graph outputs stay as they are."""
    for reader in list(old.outputs) if readers is None else readers:
        replace_input(reader, old, new)

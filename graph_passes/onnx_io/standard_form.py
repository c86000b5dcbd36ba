"""Brings a graph as people have it into the form that the passes read: sorted, without functions, fused or old operators.

Done before the first pass, on the model without its large weights: nodes are put in order, ONNX local functions are inlined,
what ONNX Runtime's optimiser fused is written out again (``fused_operators``), an opset that lacks what the passes write is
raised by ONNX's own version converter, and an Einsum becomes a product of matrices (``einsum``). What is in this form already
is returned as it is.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from functools import cache

import onnx
from onnx import checker, defs, helper, inliner, shape_inference, version_converter

from graph_passes.onnx_io.einsum import expand_einsums
from graph_passes.onnx_io.fused_operators import expand_fused, name_fused, needed_opset
from graph_passes.onnx_io.graph_convert import first_line, weights_as_inputs, with_shapes
from graph_passes.onnx_io.model import OnnxModel
from patchslim.errors import InputRejected

#: The passes write ``Shape`` with ``start``, which is there from this opset on.
LOWEST_OPSET = 15
#: Up to this opset, exclusive, a Softmax is over several axes at once.
_SOFTMAX_OPSET = 13
_MOST_AXES = 32
_ASIDE = "patchslim.aside"
#: Functions that call functions can stand for a number of nodes that grows by powers.
MAX_NODES = 100_000


def standard_form(model: OnnxModel) -> tuple[OnnxModel, list[str]]:
    """The model in the form that the passes read, and what was done to it, each in a few words; weights are shared.

    Raises ``InputRejected`` where functions call themselves, or the opset can be neither read nor raised.
    """
    changes: list[str] = []
    skeleton = model.skeleton
    order = _sorted(list(skeleton.graph.node))
    if order is not None:
        skeleton = _copy(skeleton)
        del skeleton.graph.node[:]
        skeleton.graph.node.extend(order)
        changes.append("nodes put in topological order")
    fused = name_fused(skeleton)
    if fused is not None:
        skeleton = fused
    opset = opset_of(skeleton)
    wanted = max(opset, needed_opset(skeleton), LOWEST_OPSET)
    if skeleton.functions:
        skeleton = _inlined(OnnxModel(skeleton, model.weights))
        changes.append("local functions inlined")
    if opset < wanted:
        skeleton = _converted(OnnxModel(skeleton, model.weights), opset, wanted)
        changes.append(f"opset {opset} raised to {wanted}")
    expanded, kinds = expand_fused(OnnxModel(skeleton, model.weights))
    if kinds:
        skeleton = _inlined(OnnxModel(expanded, model.weights))
        _drop_import(skeleton, "com.microsoft")
        changes.append(f"written out again what ONNX Runtime had fused: {', '.join(kinds)}")
    if any(node.op_type == "Einsum" for node in skeleton.graph.node):
        inferred = with_shapes(OnnxModel(skeleton, model.weights))
        found, count = expand_einsums(inferred.skeleton, {name: weight.shape for name, weight in model.weights.items()})
        if count:
            skeleton = found
            changes.append(f"{count} Einsum written as products of matrices")
    return (OnnxModel(skeleton, model.weights), changes) if changes else (model, [])


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators that a model imports; 1 where it names none."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(model)
    return result


def _sorted(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto] | None:
    """The nodes in topological order, those listed first first; None where they are so already, or go in circles."""
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    sources = [{maker[name] for name in _read_by(node) if name in maker} - {index} for index, node in enumerate(nodes)]
    if all(source < index for index, found in enumerate(sources) for source in found):
        return None
    readers: list[list[int]] = [[] for _ in nodes]
    for index, found in enumerate(sources):
        for source in found:
            readers[source].append(index)
    waiting = [len(found) for found in sources]
    ready = [index for index, count in enumerate(waiting) if not count]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            waiting[reader] -= 1
            if not waiting[reader]:
                heapq.heappush(ready, reader)
    return [nodes[index] for index in order] if len(order) == len(nodes) else None


def _read_by(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, those that its subgraphs take from around them among them."""
    yield from node.input
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else attribute.graphs:
            for inner in graph.node:
                yield from _read_by(inner)
            yield from (output.name for output in graph.output)


def _inlined(model: OnnxModel) -> onnx.ModelProto:
    """The skeleton with every call of a local function replaced by its nodes. Raises ``InputRejected``."""
    functions = {(function.domain, function.name): function for function in model.skeleton.functions}
    inside: set[tuple[str, str]] = set()

    @cache
    def size(key: tuple[str, str]) -> int:
        if key in inside:
            raise InputRejected(f"local function '{key[1]}' calls itself; export the model without it")
        inside.add(key)
        total = sum(count(node) for node in functions[key].node)
        inside.discard(key)
        return total

    def count(node: onnx.NodeProto) -> int:
        graphs = [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs)]
        inner = sum(count(below) for graph in graphs for below in graph.node)
        key = (node.domain, node.op_type)
        return 1 + inner + (size(key) if key in functions else 0)

    if sum(count(node) for node in model.graph.node) > MAX_NODES:
        raise InputRejected(f"its local functions stand for more than {MAX_NODES} nodes; export the model without them")
    bare = _checked(model)
    try:
        result = inliner.inline_local_functions(bare, convert_version=True)
    except Exception as error:  # of several kinds, all the graph's fault
        raise InputRejected(
            f"its local functions cannot be inlined: {first_line(error)}; export the model without them"
        ) from error
    return _with_inputs_of(result, model.skeleton)


def _converted(model: OnnxModel, opset: int, wanted: int) -> onnx.ModelProto:
    """The skeleton at opset ``wanted``. Raises ``InputRejected``."""
    step = "export the model with opset 17 or newer"
    try:
        bare = _checked(model)
        if opset < _SOFTMAX_OPSET:
            _set_aside_softmaxes(bare)
        result = version_converter.convert_version(bare, wanted)
        for node in result.graph.node:
            if node.domain == _ASIDE:
                node.domain = ""
        _drop_import(result, _ASIDE)
        checker.check_model(result)
    except InputRejected:
        raise
    except Exception as error:  # the converter's exceptions share no base of their own
        raise InputRejected(f"opset {opset} cannot be raised to {wanted}: {first_line(error)}; {step}") from error
    return _with_inputs_of(result, model.skeleton)


def _set_aside_softmaxes(model: onnx.ModelProto) -> None:
    """Put every Softmax over the last axis, which means the same in all opsets, where the converter leaves it alone.

    It would flatten what such a node reads and give it its shape back: up to opset 12 a Softmax is over all axes from
    ``axis`` (there by default 1) on.
    """
    ranks, found = _ranks(model), False
    for node in model.graph.node:
        if node.op_type not in ("Softmax", "LogSoftmax") or node.domain not in ("", "ai.onnx"):
            continue
        axis = next((entry.i for entry in node.attribute if entry.name == "axis"), 1)
        if axis in (-1, ranks.get(node.input[0], 0) - 1):
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("axis", -1))
            node.domain, found = _ASIDE, True
    if found:
        model.opset_import.append(helper.make_opsetid(_ASIDE, 1))


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """How many axes tensors have. Where a Reshape's shape is computed ONNX infers none, so that rank is told to it."""
    guessed = onnx.ModelProto()
    guessed.CopyFrom(model)
    del guessed.graph.value_info[:]
    told: set[str] = set()
    while True:
        graph = shape_inference.infer_shapes(guessed, data_prop=True).graph
        types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
        shapes = {name: [dim.dim_value for dim in kind.shape.dim] for name, kind in types.items() if kind.HasField("shape")}
        shapes |= {tensor.name: list(tensor.dims) for tensor in graph.initializer}
        before = len(told)
        for node in graph.node:
            lengths = shapes.get(node.input[1], ()) if node.op_type == "Reshape" and node.output[0] not in shapes else ()
            if len(lengths) == 1 and 0 < lengths[0] <= _MOST_AXES and node.output[0] in types.keys() - told:
                kind = types[node.output[0]].elem_type
                guessed.graph.value_info.append(helper.make_tensor_value_info(node.output[0], kind, [None] * lengths[0]))
                told.add(node.output[0])
        if len(told) == before:
            return {name: len(shape) for name, shape in shapes.items()}


def _checked(model: OnnxModel) -> onnx.ModelProto:
    """The skeleton with weights as inputs, which ONNX's own tools can then be given. Raises ``InputRejected``."""
    bare = weights_as_inputs(model)
    newest = defs.onnx_opset_version()
    if opset_of(bare) > newest:
        raise InputRejected(f"opset {opset_of(bare)}: onnx {onnx.__version__} knows opsets up to {newest}; install a newer one")
    try:
        checker.check_model(bare)
    except checker.ValidationError as error:
        raise InputRejected(f"not a valid ONNX graph: {first_line(error)}") from error
    return bare


def _with_inputs_of(model: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """``model`` with the graph inputs, versions and metadata that ``source`` has; inner shapes are inferred anew later."""
    del model.graph.input[:]
    model.graph.input.extend(source.graph.input)
    del model.graph.output[:]
    model.graph.output.extend(source.graph.output)
    del model.graph.value_info[:]
    model.ir_version = source.ir_version
    model.producer_name, model.producer_version = source.producer_name, source.producer_version
    del model.metadata_props[:]
    model.metadata_props.extend(source.metadata_props)
    return model


def _drop_import(model: onnx.ModelProto, domain: str) -> None:
    """Remove the import of a domain of which no node is left."""
    if any(node.domain == domain for node in model.graph.node):
        return
    kept = [entry for entry in model.opset_import if entry.domain != domain]
    del model.opset_import[:]
    model.opset_import.extend(kept)

"""Valid graphs that are no Vision Transformer, or one that the passes must not touch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.helpers.attacks.registry import attack, damage, node
from tests.helpers.attacks.vit import INTEGERS, WEIGHTS, parsed, tiny_vit

NOT_ONE = "not a Vision Transformer that the passes understand: "

#: Queries, keys and values of ``x`` [batch, n, 8], and their attention, ``y``.
ATTENTION = """
  q = MatMul(x, wq0)  k = MatMul(x, wk0)  v = MatMul(x, wv0)  t = Transpose <perm = [0, 2, 1]> (k)
  s = MatMul(q, t)  {mask}  p = Softmax <axis = -1> ({scores})  a = MatMul(p, v)  o = MatMul(a, wo0)  y = Add(x, o)
"""
PLAIN = ATTENTION.format(mask="", scores="s")


def model(text: str, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A model from ONNX's text format with those initializers of ``tiny_vit`` that it reads, and others of the shapes given."""
    return parsed(text, {**WEIGHTS, **shapes}, INTEGERS)


@attack(NOT_ONE + "graph: .*no attention")
def a_convolutional_network(folder: Path) -> onnx.ModelProto:
    return model(
        """cnn (float[batch, 3, 8, 8] images) => (float[batch, 3] logits) {
        c = Conv <strides = [4, 4]> (images, patch)  r = Relu(c)  pooled = GlobalAveragePool(r)  f = Flatten(pooled)
        z = MatMul(f, head)  logits = Softmax <axis = -1> (z)
        }"""
    )


@attack(NOT_ONE + "graph input 'ids': expected images")
def a_text_transformer(folder: Path) -> onnx.ModelProto:
    return model(
        f"""text (int64[batch, 16] ids) => (float[batch, 3] logits) {{
        x = Gather <axis = 0> (words, ids)  {PLAIN}  first = Gather <axis = 1> (y, zero)  logits = MatMul(first, head)
        }}""",
        words=(100, 8),
    )


@attack(NOT_ONE + "graph input 'features': expected images")
def an_attention_over_features(folder: Path) -> onnx.ModelProto:
    return model(
        f"""sets (float[batch, 5, 8] features) => (float[batch, 3] logits) {{
        x = Identity(features)  {PLAIN}  first = Gather <axis = 1> (y, zero)  logits = MatMul(first, head)
        }}"""
    )


@attack(NOT_ONE + ".*expected")
def an_attention_over_rows_of_pixels(folder: Path) -> onnx.ModelProto:
    return model(
        f"""rows (float[batch, 3, 8, 8] images) => (float[batch, 3] logits) {{
        one_channel = Gather <axis = 1> (images, zero)  x = Identity(one_channel)  {PLAIN}
        first = Gather <axis = 1> (y, zero)  logits = MatMul(first, head)
        }}"""
    )


@attack(NOT_ONE + ".*expected")
def an_attention_over_channels(folder: Path) -> onnx.ModelProto:
    proto = model(
        f"""channels (float[batch, 3, 8, 8] images) => (float[batch, 3] logits) {{
        grid = Conv <strides = [4, 4]> (images, patch)  wide = Reshape(grid, sides)  x = MatMul(wide, widen)  {PLAIN}
        first = Gather <axis = 1> (y, zero)  logits = MatMul(first, head)
        }}""",
        widen=(4, 8),
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0, 8, 4], np.int64), "sides"))
    return proto


@attack(NOT_ONE + ".*expected")
def attention_in_windows(folder: Path) -> onnx.ModelProto:
    """Tokens of a 4 x 4 grid, four windows of 2 x 2 that attend within themselves, as in Swin."""
    proto = model(
        f"""windows (float[batch, 3, 16, 16] images) => (float[batch, 3] logits) {{
        grid = Conv <strides = [4, 4]> (images, patch)  cut = Reshape(grid, in_windows)
        turned = Transpose <perm = [0, 2, 4, 3, 5, 1]> (cut)  x = Reshape(turned, of_windows)  {PLAIN}
        back = Reshape(y, of_images)  mean = ReduceMean <keepdims = 0> (back, one)  logits = MatMul(mean, head)
        }}"""
    )
    for name, values in (("in_windows", [0, 8, 2, 2, 2, 2]), ("of_windows", [-1, 4, 8]), ("of_images", [-1, 16, 8])):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, np.int64), name))
    return proto


@attack(NOT_ONE + ".*expected")
def a_mask_that_is_computed(folder: Path) -> onnx.ModelProto:
    """Which tokens may be read depends on the images, so a token's index says nothing."""
    mask = "level = ReduceMean <keepdims = 1> (s, two)  gate = Greater(s, level)  h = Where(gate, s, low)"
    masked = ATTENTION.format(mask=mask, scores="h")
    proto = model(
        f"""masked (float[batch, 3, 8, 8] images) => (float[batch, 3] logits) {{
        grid = Conv <strides = [4, 4]> (images, patch)  rows = Reshape(grid, flat)  x = Transpose <perm = [0, 2, 1]> (rows)
        {masked}  mean = ReduceMean <keepdims = 0> (y, one)  logits = MatMul(mean, head)
        }}""",
        low=(),
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([2], np.int64), "two"))
    return proto


def within(proto: onnx.ModelProto, output: str, wrapper: onnx.NodeProto) -> None:
    """Put another node in the place of the one that computes ``output``."""
    node(proto, output).CopyFrom(wrapper)


def identity(name: str, output: str) -> onnx.GraphProto:
    """A subgraph that hands out a tensor of the graph around it."""
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph([helper.make_node("Gelu", [name], [output])], f"make_{output}", [], [value])


def condition(proto: onnx.ModelProto) -> None:
    """Compute ``yes`` of the images: one that is constant would be folded, and the If replaced by a branch of it."""
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0), "nothing"))
    proto.graph.node.insert(0, helper.make_node("ReduceMax", ["images"], ["brightest"], keepdims=0))
    proto.graph.node.insert(1, helper.make_node("Greater", ["brightest", "nothing"], ["yes"]))


@damage(NOT_ONE + ".*If node")
def an_if_in_a_block(proto: onnx.ModelProto) -> None:
    condition(proto)
    branches = {"then_branch": identity("u0", "then_g"), "else_branch": identity("u0", "else_g")}
    within(proto, "g0", helper.make_node("If", ["yes"], ["g0"], **branches))


@damage(NOT_ONE + ".*Loop node|not a valid ONNX graph")
def a_loop_in_a_block(proto: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Gelu", ["state"], ["next"]), helper.make_node("Identity", ["go"], ["on"])],
        "body",
        [value("count", TensorProto.INT64, []), value("go", TensorProto.BOOL, []), value("state", TensorProto.FLOAT, None)],
        [value("on", TensorProto.BOOL, []), value("next", TensorProto.FLOAT, None)],
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(2**62), "rounds"))
    within(proto, "g0", helper.make_node("Loop", ["rounds", "", "u0"], ["g0"], body=body))


@damage(NOT_ONE + ".*Scan node|not a valid ONNX graph")
def a_scan_in_a_block(proto: onnx.ModelProto) -> None:
    value = helper.make_tensor_value_info
    body = helper.make_graph(
        [helper.make_node("Gelu", ["row"], ["done"])],
        "body",
        [value("row", TensorProto.FLOAT, None)],
        [value("done", TensorProto.FLOAT, None)],
    )
    within(proto, "g0", helper.make_node("Scan", ["u0"], ["g0"], body=body, num_scan_inputs=1))


@damage(NOT_ONE + "If node '.*': expected no subgraph that reads what is computed of the images")
def an_if_that_hides_a_mean_over_tokens(proto: onnx.ModelProto) -> None:
    """Its result has no axis of tokens, and yet it changes with every token that is dropped."""
    value = helper.make_tensor_value_info
    condition(proto)
    branches = {
        name: helper.make_graph(
            [helper.make_node("ReduceMean", ["n1", "one"], [name], keepdims=1)],
            name,
            [],
            [value(name, TensorProto.FLOAT, None)],
        )
        for name in ("then_branch", "else_branch")
    }
    place = list(proto.graph.node).index(node(proto, "u1"))
    proto.graph.node.insert(place, helper.make_node("If", ["yes"], ["mean"], **branches))
    proto.graph.node.insert(place + 1, helper.make_node("Add", ["m1", "mean"], ["moved"]))
    node(proto, "u1").input[0] = "moved"


def nested(depth: int) -> onnx.GraphProto:
    """A subgraph with an If in it, with an If in it, and so on."""
    graph = identity("u0", "deepest")
    for level in range(depth):
        value = helper.make_tensor_value_info(f"out{level}", TensorProto.FLOAT, None)
        inner = onnx.NodeProto(op_type="If", input=["yes"], output=[f"out{level}"])
        for name in ("then_branch", "else_branch"):
            attribute = inner.attribute.add(name=name, type=onnx.AttributeProto.GRAPH)
            attribute.g.CopyFrom(graph if name == "then_branch" else identity("u0", f"else{level}"))
        graph = helper.make_graph([inner], f"level{level}", [], [value])
    return graph


def nest(proto: onnx.ModelProto, depth: int) -> None:
    condition(proto)
    branches = {"then_branch": nested(depth), "else_branch": identity("u0", "else_g")}
    within(proto, "g0", helper.make_node("If", ["yes"], ["g0"], **branches))


@damage(NOT_ONE + ".*If node|not a valid ONNX graph", alone=True)
def subgraphs_ten_deep(proto: onnx.ModelProto) -> None:
    nest(proto, 10)


@attack("not an ONNX file|cannot be read as a graph|not a valid ONNX graph", alone=True)
def subgraphs_ten_thousand_deep(folder: Path) -> bytes:
    """Written byte by byte: no library nests so deep. Node 1 > attribute 5 > graph 6, ten thousand times."""
    from graph_passes.onnx_io import protobuf_wire as wire

    graph = b""
    for _ in range(10_000):
        attribute = wire.head(1, 1) + b"g" + wire.head(6, len(graph)) + graph
        node_bytes = wire.head(4, 2) + b"If" + wire.head(5, len(attribute)) + attribute
        graph = wire.head(1, len(node_bytes)) + node_bytes
    return b"\x08\x0a" + wire.head(7, len(graph)) + graph


@damage("not a valid ONNX graph|If node '.*': expected no subgraph", alone=True)
def subgraphs_a_thousand_side_by_side(proto: onnx.ModelProto) -> None:
    condition(proto)
    source = "u0"
    place = list(proto.graph.node).index(node(proto, "g0"))
    proto.graph.node.pop(place)
    for number in range(1000):
        target = "g0" if number == 999 else f"chosen{number}"
        branches = {name: identity(source, f"{name}{number}") for name in ("then_branch", "else_branch")}
        proto.graph.node.insert(place + number, helper.make_node("If", ["yes"], [target], **branches))
        source = target


def local(proto: onnx.ModelProto, body: onnx.NodeProto) -> None:
    """Compute the first block's Gelu in a function of the model's own."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    proto.functions.append(helper.make_function("own", "Mine", ["x"], ["y"], [body], opsets))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    within(proto, "g0", helper.make_node("Mine", ["u0"], ["g0"], domain="own"))


@damage("expected operators of ONNX's own; this one is of 'own'")
def a_custom_operator(proto: onnx.ModelProto) -> None:
    proto.opset_import.append(helper.make_opsetid("own", 1))
    within(proto, "g0", helper.make_node("Mine", ["u0"], ["g0"], domain="own"))


@damage("its local functions stand for more than 100000 nodes", alone=True)
def local_functions_that_double_forty_times(proto: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    for number in range(40):
        body = [
            helper.make_node("Gelu", ["x"], ["y"])
            if number == 39
            else helper.make_node(f"Mine{number + 1}", [source], [result], domain="own")
            for source, result in (("x", "z"), ("z", "y"))
        ][number == 39 :]
        proto.functions.append(helper.make_function("own", f"Mine{number}", ["x"], ["y"], body, opsets))
    proto.opset_import.append(helper.make_opsetid("own", 1))
    within(proto, "g0", helper.make_node("Mine0", ["u0"], ["g0"], domain="own"))


@damage("local function 'Mine' calls itself", alone=True)
def a_local_function_that_calls_itself(proto: onnx.ModelProto) -> None:
    local(proto, helper.make_node("Mine", ["x"], ["y"], domain="own"))


@attack("data of 'hidden' is outside the model's folder")
def external_data_in_a_local_function(folder: Path) -> onnx.ModelProto:
    proto = tiny_vit()
    value = TensorProto(name="hidden", data_type=1, dims=[1], data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="/etc/hostname")
    local(proto, helper.make_node("Constant", [], ["y"], value=value))
    return proto


@damage("expected")
def a_causal_mask(proto: onnx.ModelProto) -> None:
    """Trilu of the scores: which tokens a token reads depends on its place, so that places must not move."""
    place = list(proto.graph.node).index(node(proto, "p0"))
    node(proto, "p0").input[0] = "lower"
    proto.graph.node.insert(place, helper.make_node("Trilu", ["s0"], ["lower"], upper=0))


@damage("expected")
def an_attention_over_queries(proto: onnx.ModelProto) -> None:
    node(proto, "p0").attribute[0].i = 2


@damage("expected")
def a_running_sum_over_tokens(proto: onnx.ModelProto) -> None:
    place = list(proto.graph.node).index(node(proto, "g0"))
    node(proto, "g0").input[0] = "summed"
    proto.graph.node.insert(place, helper.make_node("CumSum", ["u0", "one_axis"], ["summed"]))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1, np.int64), "one_axis"))

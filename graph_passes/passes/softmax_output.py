"""Answer with probabilities: a Softmax over the classes behind the logits.

DeepStream's nvinfer takes what a classifier gives for probabilities: it reports the largest only where that is above a
threshold and above 0, which logits need not be. The largest class stays the largest; the output keeps its name.

Before: logits [B, classes]. After: probabilities of the same name, the sum of each row 1. It runs behind ``to_fp16``, so that
they are computed in float32. Site: the output.
"""

from __future__ import annotations

import onnx_graphsurgeon as gs

from graph_passes.analysis.patterns import MatchFailure, label
from graph_passes.node_builder import NodeBuilder, replace_all_uses
from graph_passes.pass_registry import Settings, graph_pass


@graph_pass("softmax_output", default=False)
def run(graph: gs.Graph, settings: Settings) -> int:
    """Returns 1 if the output was changed, else 0. Raises ``MatchFailure``."""
    if len(graph.outputs) != 1:
        raise MatchFailure(f"{len(graph.outputs)} graph outputs", "expected one, of logits; keep that alone with --outputs")
    (output,) = graph.outputs
    (producer,) = output.inputs
    if output.shape is None or len(output.shape) != 2:
        raise MatchFailure(label(producer), "expected logits of two axes, images and classes")
    last = producer.i() if producer.op == "Cast" else producer  # to_fp16 puts a Cast behind
    if last.op == "Softmax":
        return 0
    logits = gs.Variable(f"{output.name}.logits", dtype=output.dtype, shape=output.shape)
    replace_all_uses(output, logits)
    producer.outputs[producer.outputs.index(output)] = logits
    NodeBuilder(graph, output.name).op("Softmax", [logits], {"axis": -1}, name="softmax", output=output)
    return 1

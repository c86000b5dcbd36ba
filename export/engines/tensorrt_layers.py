"""Reads from TensorRT's build log which kernels it compiled, and counts the fused attentions among them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

LAYERS_PREFIX = "Layers:"
"""The first word of the log message that lists the compiled kernels (verbose log, detailed profiling verbosity)."""

_LIST = r"(?:\{[^{}]*\}|[^\[\]{}])*"  # tensors in braces; inside them, shapes in brackets
_KERNEL = re.compile(
    rf"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>{_LIST})\], (?:Constants: \[{_LIST}\], )?"
    rf"Outputs: \[(?P<outputs>{_LIST})\], (?:.*?, )??TacticName: (?P<tactic>[^,]*)(?:, .*?Metadata: (?P<metadata>.*))?$"
)
_TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[^\]]*)\],[^{}]*?Datatype: (?P<dtype>[^,{}]*)")
_FUSED = re.compile(r"_+(?:[a-z]+_)?f?mha(?:_|$)")  # from the start: a kernel may also bear the name of an ONNX node called mha
_REGION = re.compile(r"_myl(\d+)_")
_ORIGIN = re.compile(r"\[ONNX Layer: (.*?)\](?=\[|$|\s)")

#: The bits of tensors that hold numbers of a model, by their type as TensorRT spells it.
_BITS = {"Int8": 8, "FP8": 8, "Half": 16, "BFloat16": 16, "Float": 32}

Kernel = dict[str, Any]
"""One kernel: ``name``, ``type``, ``tactic``, ``onnx_nodes`` (names), ``inputs`` and ``outputs``.

These are lists of tensors, each a ``name``, a ``shape`` (-1 for the batch) and a ``dtype``, as TensorRT spells it.
"""


def parse_layers(message: str) -> list[Kernel]:
    """Return the kernels that the ``Layers:`` log message lists, in order.

    Raises ``ValueError`` where the message does not have the form that TensorRT-RTX 1.7 gives it: then nothing can be said
    about the kernels.
    """
    lines = message.splitlines()
    if not lines or not lines[0].startswith(LAYERS_PREFIX):
        raise ValueError("no list of layers")
    kernels = []
    for line in lines[1:]:
        if not line.strip():
            break  # what follows lists the engine's inputs and outputs in a like form
        match = _KERNEL.match(line)
        if match is None:
            raise ValueError(f"this line of the list of layers has an unknown form: {line[:200]}")
        kernels.append(
            {
                "name": match["name"],
                "type": match["type"],
                "tactic": match["tactic"],
                "inputs": _tensors(match["inputs"]),
                "outputs": _tensors(match["outputs"]),
                "onnx_nodes": _ORIGIN.findall(match["metadata"] or ""),
            }
        )
    if not kernels:
        raise ValueError("the list of layers is empty")
    return kernels


def of_profiles(kernels: Sequence[Kernel], profiles: int) -> list[list[Kernel]]:
    """The kernels of each of so many optimisation profiles: the engine has its own for each, one region behind the other.

    All together where the kernels' names do not tell the profiles apart.
    """
    regions: dict[str, list[Kernel]] = {}
    for kernel in kernels:
        found = _REGION.findall(kernel["name"])
        regions.setdefault(found[-1] if found else "", []).append(kernel)
    return list(regions.values()) if len(regions) == profiles and "" not in regions else [list(kernels)]


def count_kernels(kernels: Iterable[Kernel]) -> int:
    """Return how many kernels run on the GPU; a ``shape_call`` only computes shapes on the host."""
    return sum(kernel["type"] != "shape_call" for kernel in kernels)


def narrow_share(kernels: Iterable[Kernel], bits: int = 16) -> float | None:
    """Which fraction of the tensors between kernels, indices aside, has at most so many bits; None where there is none.

    Constants are not counted, nor what a kernel computes inside.
    """
    kinds = [
        tensor["dtype"]
        for kernel in kernels
        if kernel["type"] != "shape_call"
        for tensor in (*kernel["inputs"], *kernel["outputs"])
        if tensor["dtype"] in _BITS
    ]
    return sum(_BITS[kind] <= bits for kind in kinds) / len(kinds) if kinds else None


def count_fused_attentions(kernels: Iterable[Kernel], attentions: Iterable[str]) -> int:
    """Return how many attentions run as one multi-head-attention kernel (``_gemm_mha_v2``, ``_gemv_mha_v1`` and kin).

    ``attentions`` names the ONNX graph's Softmax and Attention nodes. An attention counts once, however many kernels were made
    of its node. Where nodes share a name, or no kernel names the nodes that it was made of, kernels are counted instead.
    """
    fused = [kernel for kernel in kernels if _FUSED.match(kernel["name"])]
    expected = list(attentions)
    names = set(expected) - {""} if len(set(expected)) == len(expected) else set()
    origins = {node for kernel in fused for node in kernel["onnx_nodes"] if node in names}
    return len(origins) if origins else len({kernel["name"] for kernel in fused})


def _tensors(text: str) -> list[dict[str, Any]]:
    return [
        {
            "name": match["name"],
            "shape": [int(size) for size in match["shape"].split(",") if size.strip()],
            "dtype": match["dtype"].strip(),
        }
        for match in _TENSOR.finditer(text)
    ]

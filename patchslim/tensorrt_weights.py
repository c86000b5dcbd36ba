"""The weights of a TensorRT engine whose file is without them, or that can be given others: read from an ONNX file.

Written against the Python API of TensorRT 10 and 11 and TensorRT-RTX 1.7. Not executed: an engine loads on its GPU alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from patchslim.errors import InputRejected, Unavailable

_NAMED = 3  # weights that a message names


def stripped_bytes(trt: Any, engine: Any) -> int:
    """How many bytes of weights a loaded engine lacks, 0 where the release does not tell (before TensorRT 10.9)."""
    statistic = getattr(getattr(trt, "EngineStat", None), "STRIPPED_WEIGHTS_SIZE", None)
    if statistic is None or not hasattr(engine, "get_engine_stat"):
        return 0
    return max(0, int(engine.get_engine_stat(statistic)))  # -1 where the engine was built with its weights


def give_weights(trt: Any, logger: Any, engine: Any, onnx: Path | bytes, name: str) -> None:
    """Give a loaded engine, which messages call ``name``, the weights of an ONNX file of the graph that it was built from.

    ``onnx`` is the file, or its bytes where it holds all its weights. Raises ``InputRejected`` where the engine was built to
    keep its weights, or the file is not of its graph, ``Unavailable`` where the GPU fails.
    """
    if not engine.refittable:
        raise InputRejected(
            f"{name}: was built to keep its weights", next_step="export with --refit or --strip-weights, or give it none"
        )
    refitter = trt.Refitter(engine, logger)
    reader = trt.OnnxParserRefitter(refitter, logger)
    read = reader.refit_from_file(str(onnx)) if isinstance(onnx, Path) else reader.refit_from_bytes(onnx)
    if not read:
        faults = "; ".join(reader.get_error(number).desc() for number in range(reader.num_errors))
        raise InputRejected(f"{name}: cannot be given the weights of its ONNX file: {faults or 'TensorRT gave no reason'}")
    if absent := refitter.get_missing_weights():
        raise InputRejected(
            f"{name}: the ONNX file lacks {len(absent)} of its weights, as {', '.join(map(repr, absent[:_NAMED]))}: it is not "
            "of the graph that the engine was built from"
        )
    if not refitter.refit_cuda_engine():
        raise Unavailable(f"{name}: the GPU did not take the weights of its ONNX file")

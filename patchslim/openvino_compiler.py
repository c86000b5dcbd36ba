"""OpenVINO graphs compiled for this CPU: for each number of rows, or any, and kept between runs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patchslim.blob_cache import keep_blob, kept_blob, warn_of_dropped
from patchslim.errors import Unavailable
from patchslim.files import digest
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.packages import install_command

#: Numbers of rows that a model is compiled for, each with its weights, and what these take together at most.
MOST_COMPILED, MOST_BYTES = 4, 512 << 20
#: What has OpenVINO fuse nothing of what it answers wrongly in a graph whose shapes are known (its "snippets").
_UNFUSED = {"SNIPPETS_MODE": "DISABLE"}


@dataclass(frozen=True)
class GraphCompiler:
    """Compiles an OpenVINO graph for this CPU, for at most ``most`` numbers of rows beside any number.

    ``properties`` are what OpenVINO is told, ``cache`` is a folder for what becomes of it, ``digests`` are of the files that
    this is made of; None: it is not kept.
    """

    graph: Any
    properties: dict[str, object]
    cache: Path | None
    digests: list[str] | None
    most: int

    @classmethod
    def of(cls, graph: Any, model: Path | bytes, settings: OpenVinoSettings) -> GraphCompiler:
        """What compiles the ``graph`` of ``model``. Raises ``RuntimeError`` as OpenVINO does, ``OSError``."""
        free = _only_rows_are_free(graph) and _can_have_one_row(graph)
        wrong = any(_has_as_many_queries_as_heads(op) for op in graph.get_ops())
        if free and wrong:
            reshape(graph, None)
        weights = sum(op.get_byte_size() for op in graph.get_ops() if op.get_type_name() == "Constant")
        most = int(min(MOST_COMPILED, max(1, MOST_BYTES // max(1, weights)))) if free and not wrong else 0
        told = settings.properties() | (_UNFUSED if wrong and not free else {})
        return cls(graph, told, settings.cache, _digests(model, settings), most)

    def compiled(self, rows: int | None) -> Any:
        """The graph for ``rows`` rows of its input, None: as many as it takes; compiled anew, or from the ``cache``.

        OpenVINO's own cache (2026.4) loads a file of which a byte was changed, and answers wrongly: so it is not used.
        """
        core, blob = openvino_core(), self._blob(rows)
        if blob is not None and (kept := kept_blob(blob)) is not None:
            try:
                return core.import_model(kept, "CPU", self.properties)
            except RuntimeError:  # compiled by something that calls itself the same, and is not
                warn_of_dropped(blob, "OpenVINO does not take it here")
        if self.most:
            reshape(self.graph, rows)
        network = core.compile_model(self.graph, "CPU", self.properties)
        if blob is not None:
            keep_blob(blob, network.export_model().getvalue())
        return network

    def _blob(self, rows: int | None) -> Path | None:
        """Where what becomes of it is kept: named by all that decides it."""
        if self.cache is None or self.digests is None:
            return None
        facts = [str(openvino_module().__version__), self.properties, os.cpu_count(), rows]
        facts += [openvino_core().get_property("CPU", name) for name in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")]
        return self.cache / f"{hashlib.sha256(json.dumps([facts, self.digests]).encode()).hexdigest()}.blob"


def reshape(graph: Any, rows: int | None) -> None:
    """Give the one input of ``graph`` so many rows, None: any number. Raises ``RuntimeError`` where it takes no such number."""
    _, *rest = graph.inputs[0].get_partial_shape()
    graph.reshape({0: [-1 if rows is None else rows, *(axis.get_length() for axis in rest)]})


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's one ``Core`` of this process, which stays to its end; raises ``Unavailable`` without OpenVINO.

    Each ``Core`` that compiles for a CPU gives the thread a stack for signals (2026.4), and takes back the one before at its
    end. Where they end in the order in which they began, the thread is left with one that is freed, and dies at its next
    signal: that of a child that ends, say.
    """
    core = openvino_module().Core()
    # Files are read when a graph is: it is compiled for other numbers of rows later, when they may be others.
    core.set_property({"ENABLE_MMAP": False})
    return core


def openvino_module() -> Any:
    """The Python package; raises ``Unavailable`` without it."""
    try:
        import openvino
    except ImportError as error:
        fault = "is not installed" if error.name == "openvino" else f"cannot be imported ({error})"
        raise Unavailable(f"OpenVINO {fault}; install it: {install_command('openvino')}") from error
    return openvino


def _digests(model: Path | bytes, settings: OpenVinoSettings) -> list[str] | None:
    """Of the files of an IR that is kept when it is compiled; an ONNX file may name others that hold its weights."""
    if settings.cache is None or not isinstance(model, Path) or model.suffix != ".xml":
        return None
    return [digest(path) for path in (model, model.with_suffix(".bin"))]


def _only_rows_are_free(graph: Any) -> bool:
    """Whether ``graph`` has one input, of which the first axis alone is free."""
    shapes = [tensor.get_partial_shape() for tensor in graph.inputs]
    if len(shapes) != 1 or shapes[0].rank.is_dynamic:
        return False
    return [axis.is_static for axis in shapes[0]] == [False] + [True] * (len(shapes[0]) - 1)


def _can_have_one_row(graph: Any) -> bool:
    """Give ``graph`` one row of its input; False where its other shapes do not allow it: then it is as it was."""
    try:
        reshape(graph, 1)
    except RuntimeError:
        return False
    return True


def _has_as_many_queries_as_heads(op: Any) -> bool:
    """Whether ``op`` is of an attention that OpenVINO (2026.4, CPU) answers wrongly where its shape is known.

    Attention weights (b, heads, queries, tokens), or their products, with as many queries as heads: it fuses the transpose
    behind them with the two axes confused, or not at all. With a free batch, or unfused, it is right.
    """
    if op.get_type_name() not in ("Softmax", "ScaledDotProductAttention"):
        return False
    shape = op.get_output_partial_shape(0)
    return bool(shape.is_static and len(shape) == 4 and shape[1] == shape[2])

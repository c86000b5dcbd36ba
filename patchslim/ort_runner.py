"""Running an ONNX file in ONNX Runtime: the one place that opens sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from patchslim.arrays import Array
from patchslim.errors import InputRejected, Unavailable


def open_session(path: Path, *, provider: str = "CPUExecutionProvider", threads: int = 0) -> Any:
    """Open ``path`` in ONNX Runtime on ``threads`` threads (0: its own choice) that do not spin between runs.

    Raises ``Unavailable`` when ONNX Runtime, the provider or an operator's kernel is not here, ``InputRejected`` when ONNX
    Runtime refuses the file.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise Unavailable("ONNX Runtime is not installed: install patchslim[edge]") from error
    if provider not in ort.get_available_providers():
        here = ", ".join(ort.get_available_providers())
        raise Unavailable(f"ONNX Runtime has no {provider} here; it has {here}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        # Left to itself ONNX Runtime answers a provider that fails to start by running on the CPU.
        session = ort.InferenceSession(str(path), options, providers=[provider], enable_fallback=0)
    except Exception as error:  # onnxruntime's exceptions share no base of their own
        if type(error).__name__ == "NotImplemented":
            raise Unavailable(f"{path}: ONNX Runtime has no kernel for it on {provider}: {error}") from error
        raise InputRejected(f"{path}: ONNX Runtime refuses it: {error}") from error
    if session.get_providers()[0] != provider:
        raise Unavailable(f"{provider} does not start here; ONNX Runtime offers {session.get_providers()[0]} instead")
    return session


def interface(session: Any) -> list[tuple[str, str, list[int | str]]]:
    """(name, ONNX Runtime type, shape) of the inputs and then the outputs; a free axis is ``'batch'``."""
    tensors = [*session.get_inputs(), *session.get_outputs()]
    return [(t.name, t.type, [axis if isinstance(axis, int) else "batch" for axis in t.shape]) for t in tensors]


def run_logits(session: Any, images: Array, *, batch: int = 8) -> Array:
    """Logits (n, classes) float32 of ``images`` (n, channels, height, width), run in batches; raises ``InputRejected``.

    A model of fixed batch size is fed that size, the last batch filled up by repeating its last image.
    """
    feed = session.get_inputs()[0]
    output = session.get_outputs()[0].name
    fixed = isinstance(feed.shape[0], int)
    size = feed.shape[0] if fixed else batch
    dtype = np.float16 if feed.type == "tensor(float16)" else np.float32
    parts = []
    for start in range(0, len(images), size):
        chunk = images[start : start + size]
        wanted = len(chunk)
        if fixed and wanted < size:
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], size - wanted, axis=0)])
        try:
            logits = session.run([output], {feed.name: chunk.astype(dtype, copy=False)})[0]
        except Exception as error:
            raise InputRejected(f"ONNX Runtime fails to run it: {error}") from error
        if logits.ndim != 2 or len(logits) != len(chunk):
            raise InputRejected(f"answers with shape {logits.shape} for {len(chunk)} images")
        parts.append(np.asarray(logits[:wanted], dtype=np.float32))
    return np.concatenate(parts)

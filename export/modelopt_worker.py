"""ModelOpt in a process of its own: ``python -m export.modelopt_worker FOLDER int8|fp8``.

Quantises ``model.onnx`` in the folder, calibrated on ``images.npy`` there, and writes ``quantised.onnx``. What ModelOpt says
goes to stderr, the reason of a failure last.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path


def main(folder: Path, mode: str) -> int:
    """Quantise, and return 0, or say why not and return 1."""
    import numpy as np
    import onnx

    name = onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.input[0].name
    try:
        with contextlib.redirect_stdout(sys.stderr):
            from modelopt.onnx.quantization import quantize

            quantize(
                str(folder / "model.onnx"),
                quantize_mode=mode,
                calibration_data={name: np.load(folder / "images.npy")},
                calibration_method="max",
                calibration_eps=["cpu"],
                high_precision_dtype="fp32",
                output_path=str(folder / "quantised.onnx"),
                log_level=logging.getLevelName(logging.ERROR),
            )
    except Exception as error:  # whatever its libraries raise
        print(f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1]), sys.argv[2]))

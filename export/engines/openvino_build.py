"""OpenVINO as the engine, on a CPU: the ONNX file as an IR, and the precision that it is run in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.engines.base import Backend, BuildOptions, EngineResult
from export.engines.onnx_info import OnnxFacts
from patchslim.choices import InferencePrecision, Precision
from patchslim.errors import Unavailable
from patchslim.openvino_runner import OpenVinoRunner, computes_bfloat16, openvino_version, save_ir
from patchslim.openvino_settings import OpenVinoSettings
from patchslim.packages import install_command, missing


def choose_backend(targets: Sequence[str] | None = None, precision: Precision | None = None) -> Backend:
    """OpenVINO on this CPU; it has no other targets.

    Raises ``Unavailable`` where it is not installed, or where bf16 is asked for and the CPU does not multiply in that.
    """
    if missing(["openvino"]):
        raise Unavailable(f"OpenVINO is not installed; install it: {install_command('openvino')}")
    if precision == "bf16" and not computes_bfloat16():
        raise Unavailable("this CPU has no bfloat16, and OpenVINO would compute in float32", next_step="use --precision fp32")
    return Backend("openvino", ("cpu",))


def inference_precision(precision: Precision) -> InferencePrecision:
    """What OpenVINO computes in where nothing is quantised: in an int8 model bf16 where the CPU has it."""
    return "bf16" if precision == "bf16" or (precision == "int8" and computes_bfloat16()) else "f32"


def build(onnx_path: Path, output_dir: Path, facts: OnnxFacts, options: BuildOptions) -> EngineResult:
    """Write ``STEM.xml`` and ``STEM.bin`` into ``output_dir``, run them once on blank images, and describe the engine.

    Raises as ``choose_backend`` does; ``InputRejected`` where OpenVINO cannot read or run the ONNX file.
    """
    choose_backend(options.targets, options.precision)
    output_dir.mkdir(parents=True, exist_ok=True)
    xml, settings = output_dir / f"{onnx_path.stem}.xml", OpenVinoSettings(inference_precision(options.precision), options.hint)
    save_ir(onnx_path, xml)
    with OpenVinoRunner(xml, settings) as runner:
        runner.infer(np.zeros((options.batch[0], *facts.image_shape), dtype=runner.dtype))
    return EngineResult(
        backend="openvino",
        version=openvino_version(),
        targets=["cpu"],
        precision=options.precision,
        batch=options.batch,
        files=[xml, xml.with_suffix(".bin")],
        layers_file=None,
        attentions=len(facts.attentions),
        executed=True,
        settings=dict(settings.record()),
    )

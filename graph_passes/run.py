"""``python -m graph_passes.run model.onnx --plan plan.json -o slim.onnx``: cut a plan's tokens out of a saved ONNX model."""

from __future__ import annotations

if __name__ == "__main__":
    from patchslim.interrupts import end_when_interrupted

    end_when_interrupted()

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from patchslim.cli import run_command
from patchslim.errors import EXIT_DONE, InputRejected, ParityFailed, PatchslimError, UsageError
from patchslim.records import atomic_path

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from graph_passes.fp16_range import Fp16Range
    from graph_passes.onnx_io.model import OnnxModel
    from graph_passes.pass_manager import SlimResult
    from graph_passes.pass_registry import PassResult
    from graph_passes.report import GraphSummary, RefusedSite
    from patchslim.plan import SlimPlan

PROG = "graph_passes.run"
EXAMPLES = (
    "dense.onnx --plan plan.json -o slim.onnx",
    "dense.onnx --plan plan.json --precision fp16 --layout packed --report report.json -o slim.fp16.onnx",
)


@dataclass(frozen=True)
class ModelGroup:
    """The ONNX file and what of it is kept."""

    model: tyro.conf.Positional[Path | None] = None
    """The dense model: an ONNX file, images to logits, features or an embedding."""
    outputs: tuple[str, ...] = ()
    """Keep these graph outputs only, as where a model also gives every token's features."""
    image_size: str | None = None
    """Fix a model that takes any image size: 224, or HEIGHTxWIDTH."""


@dataclass(frozen=True)
class CutGroup:
    """What is cut, and how the result is laid out."""

    plan: Path | None = None
    """The plan (plan.json) that says which tokens each block keeps; not needed where no chosen pass asks for it."""
    layout: Literal["split", "packed"] = "split"
    """Cut blocks with split query and key/value projections (fewest MACs) or one packed projection (fewest kernels)."""
    cut: Literal["auto", "slice", "gather", "matmul"] = "auto"
    """Operators that take rows: auto is a Slice where rows lead and else a Gather; some compilers know only one of them."""
    precision: Literal["fp32", "fp16"] = "fp32"
    """Type of the result's weights and activations; inputs and outputs stay float32."""
    samples: Path | None = None
    """Images (.npy, as the model takes them) on which the FP16 model's hidden values are checked; without them random ones."""
    allow_overflow: bool = False
    """Write the FP16 model even where hidden values pass 65504, which float16 cannot hold: it may answer NaN."""


@dataclass(frozen=True)
class ImageGroup:
    """What images the result takes."""

    image: Literal["float", "uint8-nchw", "uint8-nhwc", "float-nchw-255"] = "float"
    """What the result takes: normalised floats as before; or bytes in this order, or floats from 0 to 255 (DeepStream), which
    are normalised inside by --mean and --std."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, for pixels from 0 to 1."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, for pixels from 0 to 1."""


@dataclass(frozen=True)
class PassesGroup:
    """Which passes run."""

    passes: tuple[str, ...] = ()
    """Run these passes only, in this order; by spaces or commas."""
    also: tuple[str, ...] = ()
    """Run these optional passes too, each at its place in the list."""
    list: bool = False
    """List the passes in the order in which they run, and stop."""
    explain: str | None = None
    """Explain one pass, and stop."""


@dataclass(frozen=True)
class OutputGroup:
    """What is written and printed."""

    output: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """Where to write the slim model; written whole or not at all. Without it nothing is written, only reported."""
    save_intermediates: Path | None = None
    """A folder for the model after every pass that changed it."""
    report: Path | None = None
    """Also write this file, as JSON: what each pass did and refused, nodes, tokens and MACs before and after."""
    json: bool = False
    """Print the report as one JSON object instead of tables."""


@dataclass(frozen=True)
class PassOptions(OutputGroup, PassesGroup, ImageGroup, CutGroup, ModelGroup):
    """Cut the tokens that a plan drops out of an exported Vision Transformer, whoever exported it."""


def run(options: PassOptions) -> int:
    """Cut the model as the options say, and return the exit code. Raises ``PatchslimError``."""
    if options.list or options.explain is not None:
        return _describe(options)
    if options.model is None:
        raise UsageError("MODEL missing: name an ONNX file; see --help")
    size = _image_size(options.image_size)
    from patchslim.plan import load_plan

    plan = None if options.plan is None else load_plan(options.plan)
    _ensure_chosen(options, plan)
    _ensure_writable(options)
    from graph_passes.onnx_io.files import save_model

    with contextlib.redirect_stdout(sys.stderr):  # onnx-graphsurgeon logs to stdout, which is kept for the result
        model, changes = _load(options, options.model, size)
        outcome = replace(_cut(options, model, plan), prepared=changes)
    try:
        if outcome.result is not None and options.output is not None:
            save_model(outcome.result.model, options.output)
    except OSError as fault:
        raise _unwritable(options.output, fault) from fault
    try:
        _publish(options, plan, outcome)
    except BrokenPipeError:
        raise  # whoever reads has read enough; the model is there
    except OSError as fault:
        raise _unwritable("the report", fault) from fault
    if outcome.error is not None:
        raise outcome.error
    return EXIT_DONE


def _unwritable(what: object, fault: OSError) -> UsageError:
    return UsageError(f"{fault.filename or what}: cannot be written: {fault.strerror or fault}")


def _ensure_writable(options: PassOptions) -> None:
    """Raise ``UsageError`` before anything is read where a path to be written is none that a file can have."""
    files = {"--output": options.output, "--report": options.report}
    for flag, path in {**files, "--save-intermediates": options.save_intermediates}.items():
        if path is None:
            continue
        try:
            str(path).encode()
            # the longest name that is made of it; whether it exists does not matter
            path.with_name(f".{path.stem}-01234567.data.{path.suffix}.{os.getpid()}.part").exists()
        except UnicodeEncodeError as fault:
            raise UsageError(f"{flag} {str(path)!r}: expected a name in UTF-8, as ONNX and JSON have it") from fault
        except OSError as fault:
            raise UsageError(f"{flag} {path}: cannot be written: {fault.strerror or fault}") from fault
        if flag in files and (path.is_dir() or not path.name):
            raise UsageError(f"{flag} {path}: is a folder; name a file in it")


@dataclass(frozen=True)
class _Outcome:
    """Summaries of the graph before and after; the result, or the error that a refusal ends the run with."""

    before: GraphSummary
    after: GraphSummary | None = None
    result: SlimResult | None = None
    error: PatchslimError | None = None
    passes: Sequence[PassResult] = ()
    refused: Sequence[RefusedSite] = ()
    fp16: Fp16Range | None = None
    prepared: Sequence[str] = ()


def _cut(options: PassOptions, model: OnnxModel, plan: SlimPlan | None) -> _Outcome:
    """Run the passes. A refusal is returned rather than raised, so that it can be reported before it ends the run."""
    from graph_passes.analysis.foreign_operators import NEXT_STEP
    from graph_passes.pass_manager import PassesRefused, slim
    from graph_passes.report import RefusedSite, distinct_refusals, summarize

    try:
        before, fault = summarize(model)
    except InputRejected as error:
        raise InputRejected(f"{options.model}: {error}") from error
    if fault is not None:
        message = f"{options.model}: not a Vision Transformer that the passes understand: {fault.site}: {fault.reason}"
        return _Outcome(before, error=InputRejected(message, next_step=NEXT_STEP), refused=[fault])
    found: list[Fp16Range] = []
    watch = _fp16_watch(options, found)
    try:
        result = slim(
            model,
            plan,
            layout=options.layout,
            precision=options.precision,
            cut=options.cut,
            image=options.image,
            mean=options.mean,
            std=options.std,
            passes=_names(options.passes) or None,
            also=_names(options.also),
            save_intermediates=options.save_intermediates,
            before_fp16=watch,
        )
    except InputRejected as cause:
        subject = str(options.model) if options.plan is None else f"{options.model} with plan {options.plan}"
        if isinstance(cause, PassesRefused):
            passes, refused = cause.result.results, distinct_refusals(cause.result.results)
            told = InputRejected(f"{subject}: {cause.message}", next_step=cause.next_step)
        else:
            passes, refused = [], [RefusedSite(site="plan", reason=str(cause))]
            told = InputRejected(f"{subject}: {cause}")
        return _Outcome(before, error=told, passes=passes, refused=refused)
    except OSError as error:
        raise UsageError(f"--save-intermediates {error.filename}: cannot be written: {error.strerror or error}") from error
    after = summarize(result.model)[0] if result.modified else before
    fp16 = found[0] if found else None
    if fp16 is not None and fp16.fits is False and not options.allow_overflow:
        message = (
            f"{options.model}: --precision fp16: {fp16.described()}, and nothing was written. Try --precision fp32, or bf16 "
            "where the engine has it; --samples FILE.npy checks your own images, --allow-overflow writes the model all the same"
        )
        return _Outcome(before, error=ParityFailed(message), passes=result.results, fp16=fp16)
    return _Outcome(before, after, result, passes=result.results, fp16=fp16)


def _fp16_watch(options: PassOptions, found: list[Fp16Range]) -> Callable[[OnnxModel], None]:
    """What looks at the model before it becomes FP16 and notes in ``found`` how large its hidden values get."""
    samples = None if options.samples is None else _samples(options.samples)

    def watch(model: OnnxModel) -> None:
        from graph_passes.fp16_range import fp16_range

        found.append(fp16_range(model, samples, "random" if options.samples is None else str(options.samples)))
        if options.samples is not None and found[-1].reason is not None:
            raise InputRejected(f"--samples {options.samples}: {found[-1].reason}")

    return watch


def _samples(path: Path) -> NDArray[np.generic]:
    """The images of a ``.npy`` file; raises ``InputRejected``."""
    import numpy as np

    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputRejected(f"--samples {path}: cannot be read as images in a .npy file: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim < 2 or not array.size or array.dtype.kind not in "fu":
        raise InputRejected(f"--samples {path}: expected an array of images, the first axis their number")
    return array


def _load(options: PassOptions, path: Path, size: tuple[int, int] | None) -> tuple[OnnxModel, list[str]]:
    """The model in standard form, with the outputs and the image size that were asked for; and what the form took."""
    from graph_passes.onnx_io.files import clipped, read_model
    from graph_passes.onnx_io.standard_form import standard_form

    model = read_model(path)
    try:
        model, changes = standard_form(model)
        if options.outputs:
            from graph_passes.onnx_io.graph_interface import with_outputs

            model = with_outputs(model, options.outputs)
        if size is not None:
            from graph_passes.onnx_io.graph_interface import with_image_size

            model = with_image_size(model, *size)
    except PatchslimError as error:
        raise type(error)(f"{path}: {error}") from error
    except Exception as error:  # a hostile file can trip the readers anywhere; the cause stays chained
        raise InputRejected(f"{path}: cannot be read as a graph: {type(error).__name__}: {clipped(error)}") from error
    return model, changes


def _image_size(text: str | None) -> tuple[int, int] | None:
    """``224`` or ``224x256`` as height and width."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text)
    if found is None:
        raise UsageError(f"--image-size {text}: neither a number of pixels, as 224, nor HEIGHTxWIDTH, as 224x256")
    return int(found[1]), int(found[2] or found[1])


def _names(values: Sequence[str]) -> Sequence[str]:
    """Names that were separated by spaces or by commas."""
    return [name for value in values for name in value.split(",") if name]


def _ensure_chosen(options: PassOptions, plan: SlimPlan | None) -> None:
    """Raise ``UsageError`` before anything is read where the passes and the options for them do not go together."""
    from graph_passes.pass_manager import default_passes, ensure_known, ensure_plan

    names = _names(options.passes) or default_passes(options.layout, options.precision, options.image, _names(options.also))
    ensure_known(names)
    ensure_plan(names, plan)
    if "image_input" not in names and (options.image != "float" or options.mean or options.std):
        raise UsageError("--image, --mean and --std are for the pass image_input; name it with --passes or --also")
    if "to_fp16" not in names and options.precision == "fp16":
        raise UsageError("--precision fp16 is the work of the pass to_fp16; name it with --passes")
    if "to_fp16" not in names and (options.samples is not None or options.allow_overflow):
        raise UsageError("--samples and --allow-overflow are for a model that becomes FP16: give --precision fp16")


def _publish(options: PassOptions, plan: SlimPlan | None, outcome: _Outcome) -> None:
    """Print the report and, where asked for, write it; raises ``OSError``."""
    from graph_passes.report import Report, macs_reduction, pass_records, print_report

    report = Report(
        model=str(options.model),
        plan=None if options.plan is None else str(options.plan),
        output=None if options.output is None or outcome.result is None else str(options.output),
        layout=options.layout,
        precision=options.precision,
        cut=options.cut,
        image=options.image,
        modified=outcome.result is not None and outcome.result.modified,
        nodes=None if outcome.after is None else outcome.after.nodes,
        plan_macs=None if plan is None else plan.macs(options.layout),
        dense_macs=None if plan is None else plan.dense_macs(),
        macs_reduction=macs_reduction(outcome.before, outcome.after),
        passes=pass_records(outcome.passes),
        refused=[*outcome.refused],
        prepared=[*outcome.prepared],
        fp16=outcome.fp16,
        error=None if outcome.error is None else str(outcome.error),
        before=outcome.before,
        after=outcome.after,
    )
    text = report.model_dump_json(indent=1)
    if options.report is not None:
        with atomic_path(options.report) as part:
            part.write_text(text + "\n", encoding="utf-8")
    if options.json and outcome.error is not None:
        outcome.error.found = report.model_dump(mode="json")  # printed with the error
    elif options.json:
        print(text)
    else:
        print_report(report)


def _describe(options: PassOptions) -> int:
    """Print the passes, or one pass's explanation."""
    from graph_passes import PASSES
    from graph_passes.pass_manager import ensure_known

    chosen = [*PASSES] if options.explain is None else [options.explain]
    ensure_known(chosen)
    if options.json:
        print(json.dumps({name: PASSES[name].explanation for name in chosen}))
    elif options.explain is not None:
        print(PASSES[options.explain].explanation)
    else:
        for name in chosen:
            entry = PASSES[name]
            place, plan = "default" if entry.default else "optional", "plan" if entry.needs_plan else ""
            print(f"{name + ':':<18}{place:<10}{plan:<6}{entry.summary}")
    return EXIT_DONE


def main(prog: str = PROG) -> int:
    """The command line's entry point, called ``prog`` in its messages; returns the exit code."""
    description = PassOptions.__doc__ or ""
    return run_command(PassOptions, run, prog=prog, description=description, extra="edge", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())

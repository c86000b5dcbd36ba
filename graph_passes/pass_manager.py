"""Runs passes in order and checks the model after each one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs
from onnx import checker, shape_inference

import graph_passes.passes  # noqa: F401 - registers the passes
from graph_passes.analysis.foreign_operators import NEXT_STEP
from graph_passes.analysis.patterns import MatchFailure
from graph_passes.fp16_range import Fp16Range, fp16_range
from graph_passes.onnx_io.files import clipped, read_model, save_model
from graph_passes.onnx_io.graph_convert import export_model, import_graph, with_shapes
from graph_passes.onnx_io.model import OnnxModel, as_model
from graph_passes.onnx_io.standard_form import standard_form
from graph_passes.pass_registry import PASSES, CutForm, ImageForm, PassResult, Refusal, Settings
from patchslim.choices import Layout, Precision
from patchslim.errors import InputRejected, ParityFailed, UsageError, did_you_mean
from patchslim.plan import SlimPlan

#: How often a pass that repeats is run at most.
_MAX_ROUNDS = 5
#: From this size on, in bytes, memory is worth the time of a garbage collection after each pass.
_GC_BYTES = 2**26


@dataclass(frozen=True)
class SlimResult:
    """The model after the passes, and what each of them did, in order.

    ``fp16`` says how large the hidden values of a model got that became FP16; None where that was not asked for, and so is not
    known: values beyond 65504 make such a model answer NaN.
    """

    model: OnnxModel
    results: list[PassResult]
    fp16: Fp16Range | None = None

    @property
    def modified(self) -> bool:
        """Whether any pass changed anything."""
        return any(result.modified for result in self.results)


class PassesRefused(InputRejected):
    """Passes refused the graph: half a plan would be a wrong model. ``result`` says what each pass did."""

    def __init__(self, result: SlimResult) -> None:
        first = next(entry for entry in result.results if entry.refused)
        super().__init__(
            f"pass {first.name} refused at {first.refused[0].site}: {first.refused[0].reason}", next_step=NEXT_STEP
        )
        self.result = result


def default_passes(layout: Layout, precision: Precision, image: ImageForm = "float", also: Sequence[str] = ()) -> list[str]:
    """Names of the passes that ``slim`` runs, in order: the default ones, and those named by ``also``.

    Raises ``UsageError`` for a name that no pass has.
    """
    ensure_known(also)
    left_out = {"split_qkv"} if layout == "packed" else set()
    if precision == "fp32":
        left_out.add("to_fp16")
    added = {*also, "image_input"} if image != "float" else {*also}
    return [name for name, entry in PASSES.items() if name in added or (entry.default and name not in left_out)]


def run_passes(
    model: OnnxModel | onnx.ModelProto,
    names: Sequence[str],
    settings: Settings,
    save_intermediates: Path | None = None,
    before_fp16: Callable[[OnnxModel], None] | None = None,
) -> SlimResult:
    """Run the named passes in the order given; ``model`` itself is not changed, and weights that no pass reads are not loaded.

    The passes are given the model in ``standard_form``.
    A pass that does not understand the graph leaves it as it was; its result's ``refused`` says why. After each change the
    model is checked and, where ``save_intermediates`` is a folder, saved there as ``NN_name.onnx``. ``before_fp16`` is given
    the model that ``to_fp16`` is to run on, where nothing was refused.
    Raises ``UsageError`` for a name that no pass has, or a pass that needs a plan where there is none; ``InputRejected`` for an
    invalid model, or a plan that is for another model.
    """
    ensure_known(names)
    ensure_plan(names, settings.plan)
    current, _ = standard_form(as_model(model))
    results: list[PassResult] = []
    graph = import_graph(with_shapes(current))
    for number, name in enumerate(names):
        total, refused, interface = 0, [], _interface(graph)
        if name == "to_fp16" and before_fp16 is not None and not any(result.refused for result in results):
            before_fp16(current)
        for _ in range(_MAX_ROUNDS if PASSES[name].repeat else 1):
            try:
                sites = PASSES[name].run(graph, settings)
            except MatchFailure as failure:
                refused.append(Refusal(failure.site, failure.expected))
                graph = import_graph(with_shapes(current))
                break
            if _interface(graph) != interface:
                raise RuntimeError(f"a bug in pass {name}: inputs and outputs were {interface}, are {_interface(graph)}")
            if not sites:
                break
            total += sites
            current = export_model(graph, like=current)
            graph = import_graph(with_shapes(current))
            if current.nbytes > _GC_BYTES:
                gc.collect()  # nodes and tensors refer to each other: the graph before would keep the arrays of earlier passes
        results.append(PassResult(name, total > 0, total, refused))
        if total and save_intermediates is not None:
            save_model(current, save_intermediates / f"{number:02d}_{name}.onnx")
    return SlimResult(current, results)


def _interface(graph: gs.Graph) -> list[list[str]]:
    """Names of the graph's inputs and outputs, which no pass may change: callers feed and read by them."""
    return [[tensor.name for tensor in tensors] for tensors in (graph.inputs, graph.outputs)]


def ensure_known(names: Sequence[str]) -> None:
    """Raise ``UsageError`` for a name that no pass has."""
    if unknown := [name for name in names if name not in PASSES]:
        raise UsageError(f"no pass named {', '.join(unknown)}; there are {', '.join(PASSES)}{did_you_mean(unknown[0], PASSES)}")


def ensure_plan(names: Sequence[str], plan: SlimPlan | None) -> None:
    """Raise ``UsageError`` where a pass needs a plan and there is none."""
    needing = [name for name in names if PASSES[name].needs_plan]
    if plan is None and needing:
        raise UsageError(
            f"no plan (--plan), and {', '.join(needing)} cannot do without; `python -m slimming.run --onnx MODEL` finds one, "
            "and --passes fold_constants,cut_last_block needs none"
        )


def slim(
    model: OnnxModel | onnx.ModelProto,
    plan: SlimPlan | None,
    *,
    layout: Layout = "split",
    precision: Precision = "fp32",
    cut: CutForm = "auto",
    image: ImageForm = "float",
    mean: Sequence[float] = (),
    std: Sequence[float] = (),
    passes: Sequence[str] | None = None,
    also: Sequence[str] = (),
    save_intermediates: Path | None = None,
    before_fp16: Callable[[OnnxModel], None] | None = None,
    check_fp16: bool = False,
) -> SlimResult:
    """Cut the tokens that ``plan`` drops out of a dense Vision Transformer, ``images [B, 3, H, W]`` to ``logits [B, classes]``.

    ``layout``: in cut blocks ``split`` query and key/value projections, or one ``packed`` projection. ``precision``: ``fp16``
    makes weights and activations float16. ``cut``: the operators that take rows. ``image``, ``mean``, ``std``: let the graph
    take bytes and normalise them. ``passes``: names to run instead of the default ones; ``also``: names to run beside them.
    ``before_fp16``: given the model that ``to_fp16`` is to run on.

    **FP16 ends at 65504, and by itself this function looks at weights alone**: hidden values beyond it make the result answer
    NaN. With ``check_fp16`` the model is run on random images first, read whole into memory, and ``fp16`` of the result has the
    largest value; as on the command line, ``ParityFailed`` names the layer where one does not fit. Without ONNX Runtime, or
    where that cannot run the model, ``fp16.reason`` says so. Your own images: ``graph_passes.fp16_range.fp16_range``.

    The same arguments give the same bytes; a second call on the result changes nothing.
    Raises ``PassesRefused`` or another ``InputRejected``, which name the node and what was expected there, where the graph is
    not understood or the plan is for another model; ``UsageError`` where the chosen ``passes`` leave an invalid graph.
    """
    if passes is not None and also:
        raise UsageError("passes chosen by name (--passes) are all that run; name these there too (--also): " + ", ".join(also))
    names = default_passes(layout, precision, image, also) if passes is None else passes
    settings = Settings(plan, layout, cut, image, tuple(mean), tuple(std))
    found: list[Fp16Range] = []

    def watch(before: OnnxModel) -> None:
        if check_fp16:
            found.append(fp16_range(before, None, "random"))
        if before_fp16 is not None:
            before_fp16(before)

    try:
        result = run_passes(model, names, settings, save_intermediates, watch)
    except (checker.ValidationError, shape_inference.InferenceError) as error:
        if passes is None:
            raise  # a bug in a pass
        first = str(error).strip().splitlines()[0]
        order = ", ".join(default_passes(layout, precision))
        raise UsageError(
            f"passes {', '.join(passes)} leave an invalid graph ({first}); each needs those before it: {order}"
        ) from error
    ensure_none_refused(result)
    fp16 = found[0] if found else None
    if fp16 is not None and fp16.fits is False:
        raise ParityFailed(fp16.described(), next_step="leave precision at fp32, or take bf16 where the engine has it")
    return replace(result, fp16=fp16)


def to_fp16(model: OnnxModel | onnx.ModelProto) -> OnnxModel:
    """The model with float16 weights and activations, its inputs and outputs float32 (see the pass ``to_fp16``).

    Hidden values are not looked at: ``slim`` says what that means, and its ``check_fp16`` does it. Raises ``InputRejected``
    where the graph is not understood or a weight does not fit float16.
    """
    result = run_passes(model, ["to_fp16"], Settings())
    ensure_none_refused(result)
    return result.model


def ensure_none_refused(result: SlimResult) -> None:
    """Raise ``PassesRefused`` where a pass refused the graph."""
    if any(entry.refused for entry in result.results):
        raise PassesRefused(result)


def load_model(path: Path) -> OnnxModel:
    """Read a Vision Transformer from an ONNX file and its external data; a large weight is read when its values are asked for.

    Raises ``InputRejected`` naming the file and the fault: missing, empty, truncated or corrupt, without nodes, external data
    missing or outside the model's folder, not a valid graph, or not a Vision Transformer of a form that the passes understand.
    """
    model = read_model(path)
    try:
        model, _ = standard_form(model)
        results = run_passes(model, ["fold_constants", "find_blocks"], Settings()).results
    except InputRejected as error:
        raise InputRejected(f"{path}: {clipped(error)}") from error
    except Exception as error:  # a hostile file can trip the readers anywhere; the cause stays chained
        raise InputRejected(f"{path}: cannot be read as a graph: {type(error).__name__}: {clipped(error)}") from error
    for refusal in (refusal for result in results for refusal in result.refused):
        fault = f"{refusal.site}: {refusal.reason}"
        message = f"{path}: not a Vision Transformer that the passes understand: {fault}"
        raise InputRejected(message, next_step=NEXT_STEP)
    return model

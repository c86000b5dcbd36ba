"""The report of a run, as JSON and as text: nodes, tokens and MACs before and after, and every refusal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import groupby
from math import prod
from typing import TYPE_CHECKING, Annotated

import onnx
from pydantic import Field

from graph_passes.analysis.macs import macs_of_graph
from graph_passes.analysis.patterns import MatchFailure
from graph_passes.analysis.vit_structure import Structure, find_structure
from graph_passes.fp16_range import Fp16Range
from graph_passes.onnx_io.graph_convert import import_graph, with_shapes
from graph_passes.onnx_io.model import OnnxModel
from graph_passes.onnx_io.standard_form import standard_form
from graph_passes.pass_manager import run_passes
from graph_passes.pass_registry import CutForm, ImageForm, PassResult, Settings
from patchslim.choices import Layout, Precision
from patchslim.errors import InputRejected
from patchslim.records import StrictRecord, VersionOne

if TYPE_CHECKING:
    from rich.table import Table

_Count = Annotated[int, Field(ge=0)]
_FLOATS = frozenset(
    int(getattr(onnx.TensorProto, name))
    for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
)


class BlockSummary(StrictRecord):
    """One block."""

    reads: _Count = Field(description="tokens that its keys and values come from")
    computes: _Count = Field(description="tokens whose output it computes")
    macs: _Count = Field(description="multiply-accumulates of one image")


class VitSummary(StrictRecord):
    """A Vision Transformer as the passes understand it; MACs are counted from the graph, for one image."""

    tokens: _Count = Field(description="N, prefix tokens included")
    embedded: _Count = Field(description="tokens that enter the first block; fewer than N behind drop_patches")
    width: _Count = Field(description="token width")
    grid: tuple[_Count, _Count] = Field(description="patch rows and columns")
    prefix_tokens: _Count
    head_tokens: list[_Count] = Field(description="tokens that the head reads one by one")
    pools: bool = Field(description="whether the head also takes a mean or an attention over all that are left")
    blocks: list[BlockSummary]
    stem_macs: _Count = Field(description="before the blocks")
    head_macs: _Count = Field(description="behind the blocks")
    macs: _Count = Field(description="of the whole graph")


class GraphSummary(StrictRecord):
    """One graph, before or after."""

    nodes: _Count
    operators: dict[str, _Count] = Field(description="nodes by operator")
    parameters: _Count = Field(description="elements of floating-point initializers")
    bytes: _Count = Field(description="size of the model with its weights")
    vit: VitSummary | None = Field(description="null: the graph was not understood")


class RefusedSite(StrictRecord):
    """A place that was not changed, and why."""

    site: str = Field(description="node, block or part of the graph; 'plan' where the plan is for another model")
    reason: str


class PassRecord(StrictRecord):
    """What one pass did."""

    name: str
    modified: bool
    sites: _Count
    refused: list[RefusedSite]


class Report(StrictRecord):
    """``--report``: one run of ``graph_passes.run``."""

    schema_version: VersionOne = 1
    model: str
    plan: str | None
    output: str | None = Field(description="null: nothing was written")
    layout: Layout
    precision: Precision
    cut: CutForm
    image: ImageForm
    modified: bool
    nodes: _Count | None = Field(description="of the result; null where there is none")
    plan_macs: _Count | None = Field(description="multiply-accumulates of one image by the plan's own count")
    dense_macs: _Count | None = Field(description="the same with no token dropped")
    macs_reduction: float | None = Field(description="1 - after / before, counted from the graphs")
    passes: list[PassRecord]
    refused: list[RefusedSite] = Field(description="every refused site, each once")
    prepared: list[str] = Field(default=[], description="what brought the graph into the form that the passes read")
    fp16: Fp16Range | None = Field(default=None, description="hidden values before to_fp16; null where it does not run")
    error: str | None = Field(description="why the run failed; null: it did not")
    before: GraphSummary
    after: GraphSummary | None = Field(description="null where the run failed")


def report_schema() -> dict[str, object]:
    """The JSON Schema of a report."""
    return Report.model_json_schema()


def summarize(model: OnnxModel) -> tuple[GraphSummary, RefusedSite | None]:
    """Count a model's nodes, parameters, bytes, and, where it is understood, each block's tokens and MACs.

    The second value says where and why it was not understood, else None. Raises ``InputRejected`` where it cannot be read.
    """
    try:
        return _summary(model, _understood(standard_form(model)[0])), None
    except MatchFailure as failure:
        return _summary(model, None), RefusedSite(site=failure.site, reason=failure.expected)
    except InputRejected:
        raise
    except Exception as error:  # a hostile file can trip the readers anywhere; the cause stays chained
        raise InputRejected(f"cannot be read as a graph: {type(error).__name__}: {str(error)[:1000]}") from error


def _understood(model: OnnxModel) -> Structure:
    try:
        return find_structure(import_graph(with_shapes(model)))
    except MatchFailure:  # as exported, sizes may still be computed by nodes
        folded = run_passes(model, ["fold_constants"], Settings()).model
        return find_structure(import_graph(with_shapes(folded)))


def _summary(model: OnnxModel, structure: Structure | None) -> GraphSummary:
    small = [(tensor.data_type, tuple(tensor.dims)) for tensor in model.graph.initializer]
    tensors = [*small, *((weight.data_type, weight.shape) for weight in model.weights.values())]
    return GraphSummary(
        nodes=len(model.graph.node),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
        parameters=sum(prod(shape) for data_type, shape in tensors if data_type in _FLOATS),
        bytes=model.nbytes,
        vit=None if structure is None else _vit(structure),
    )


def distinct_refusals(results: Iterable[PassResult]) -> list[RefusedSite]:
    """Every refusal, each once: several passes may stop at the same node."""
    found = {(refusal.site, refusal.reason) for result in results for refusal in result.refused}
    return [RefusedSite(site=site, reason=reason) for site, reason in sorted(found)]


def pass_records(results: Iterable[PassResult]) -> list[PassRecord]:
    """The results of passes in the report's form."""
    return [PassRecord.model_validate(result.as_dict()) for result in results]


def macs_reduction(before: GraphSummary, after: GraphSummary | None) -> float | None:
    """The share of MACs saved, ``1 - after / before``; None where one of the graphs was not understood."""
    if before.vit is None or after is None or after.vit is None or not before.vit.macs:
        return None
    return 1 - after.vit.macs / before.vit.macs


def print_report(report: Report) -> None:
    """Print a report for people: what each pass did, then what differs."""
    from patchslim.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    before, after = report.before, report.after or report.before
    if before.vit is not None:
        console.print(_sentence(before.vit))
    if report.prepared:
        console.print(f"first: {'; '.join(report.prepared)}")
    if report.passes:
        console.print(_passes(report.passes))
    if before.vit is not None and after.vit is not None:
        console.print(_blocks(before.vit, after.vit))
    operators = _operators(before, after)
    if operators.row_count:
        console.print(operators)
    for name, first, second, unit in _totals(before, after):
        console.print(f"{name}: {_total(first, second, unit)}")
    if report.fp16 is not None:
        console.print(_fp16_sentence(report.fp16))
    for refusal in report.refused:
        console.print(f"refused at {refusal.site}: {refusal.reason}")
    if report.error is None:
        console.print(f"written: {report.output}" if report.output else "nothing written: no --output")


def _vit(structure: Structure) -> VitSummary:
    macs = macs_of_graph(structure)
    blocks = [
        BlockSummary(reads=len(block.reads), computes=len(block.computes), macs=count)
        for block, count in zip(structure.blocks, macs.blocks, strict=True)
    ]
    return VitSummary(
        tokens=structure.tokens,
        embedded=len(structure.order),
        width=structure.width,
        grid=structure.grid,
        prefix_tokens=structure.prefix_tokens,
        head_tokens=structure.head_tokens,
        pools=structure.pools,
        blocks=blocks,
        stem_macs=macs.stem,
        head_macs=macs.head,
        macs=macs.total,
    )


def _sentence(vit: VitSummary) -> str:
    """The model in one sentence."""
    rows, columns = vit.grid
    parts = [f"token {', '.join(map(str, vit.head_tokens))}"] if vit.head_tokens else []
    parts += ["a pool over all tokens left"] if vit.pools else []
    return (
        f"{len(vit.blocks)} blocks of width {vit.width}; {vit.tokens} tokens: {vit.prefix_tokens} prefix and a patch grid of "
        f"{rows} x {columns}; the head reads {' and '.join(parts) or 'no token'}"
    )


def _fp16_sentence(found: Fp16Range) -> str:
    """Whether hidden values fit float16."""
    if found.largest is None:
        return f"not checked whether hidden values fit float16: {found.reason}"
    return (
        f"largest hidden value: {found.largest:g}, at {found.site}, on {found.images} images; float16 ends at {found.limit:g}"
    )


def _passes(passes: Sequence[PassRecord]) -> Table:
    from rich.table import Table

    table = Table("pass", "changed", "sites")
    for entry in passes:
        table.add_row(entry.name, "refused" if entry.refused else "yes" if entry.modified else "no", str(entry.sites))
    return table


def _blocks(before: VitSummary, after: VitSummary) -> Table:
    """Tokens and MACs part by part; blocks in a row that are alike share a line."""
    from rich.table import Table

    table = Table("block", "reads", "computes", "million MACs")
    table.add_row("stem", "", _change(before.embedded, after.embedded), _change_macs(before.stem_macs, after.stem_macs))
    pairs = list(enumerate(zip(before.blocks, after.blocks, strict=True)))
    for (one, other), group in groupby(pairs, key=lambda pair: pair[1]):
        numbers = [number for number, _ in group]
        name = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}, each"
        macs = _change_macs(one.macs, other.macs)
        table.add_row(name, _change(one.reads, other.reads), _change(one.computes, other.computes), macs)
    table.add_row("head", "", "", _change_macs(before.head_macs, after.head_macs))
    return table


def _operators(before: GraphSummary, after: GraphSummary) -> Table:
    """The operators whose number of nodes changed."""
    from rich.table import Table

    table = Table("operator", "nodes before", "after")
    for name in sorted({*before.operators, *after.operators}):
        counts = before.operators.get(name, 0), after.operators.get(name, 0)
        if counts[0] != counts[1]:
            table.add_row(name, *map(str, counts))
    return table


def _totals(before: GraphSummary, after: GraphSummary) -> list[tuple[str, int, int, str]]:
    """Name, before, after, and the unit: empty, or a name for a million."""
    totals = [
        ("nodes", before.nodes, after.nodes, ""),
        ("parameters", before.parameters, after.parameters, "million"),
        ("size", before.bytes, after.bytes, "MB"),
    ]
    if before.vit is not None and after.vit is not None:
        totals.insert(0, ("MACs of one image", before.vit.macs, after.vit.macs, "million"))
    return totals


def _total(before: int, after: int, unit: str) -> str:
    numbers = (f"{value / 1e6:.2f}" if unit else str(value) for value in (before, after))
    change = f" ({after / before - 1:+.1%})" if before and before != after else ""
    return " ".join(filter(None, (_change(*numbers), unit))) + change


def _change(before: object, after: object) -> str:
    return str(before) if before == after else f"{before} -> {after}"


def _change_macs(before: int, after: int) -> str:
    return _change(f"{before / 1e6:.2f}", f"{after / 1e6:.2f}")

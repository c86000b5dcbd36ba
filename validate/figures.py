"""A parity report's verdicts and figures, derived again: from one another, and from the golden logits that lie beside them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from patchslim.choices import Precision
from patchslim.intervals import drop_interval
from validate.comparison import mcnemar
from validate.manifest import Manifest
from validate.parity import MIN_AGREEMENT, gate, logit_tolerance, rung, stage_precision
from validate.parity_records import ParityReport, Rung

if TYPE_CHECKING:
    from validate.golden import Golden

_ROUNDING = 1e-6  # of percentages and of relative errors that were written as floats
#: A tolerance scales with the largest logit of all evaluation images, and the golden ones are some of them: it may be this
#: many times what they alone would give.
_SAMPLE = 4.0
#: FP16's tolerance until version 0.2, whatever the logits: such bundles stay readable.
_OLD_FP16_TOLERANCE = 0.1


def failed_stages(report: ParityReport) -> list[str]:
    """The stages that fail the report's own gate, by their figures or by their status; 'every stage after the original'."""
    judged, passed = gate(report.rungs, report.gate.max_top1_drop, report.gate.rule)
    failed = [
        stated.stage
        for stated, found in zip(report.rungs, judged, strict=True)
        if {"failed", "undecided"} & {stated.status, found.status}
    ]
    return failed or ([] if passed else ["every stage after the original"])


def contradictions(report: ParityReport) -> Iterator[str]:
    """What of the report cannot be, if the rest of it is: counts, percentages, intervals and statuses. A message each."""
    judged, _ = gate(report.rungs, report.gate.max_top1_drop, report.gate.rule)
    original = report.rungs[0]
    for index, (one, found) in enumerate(zip(report.rungs, judged, strict=True)):
        if not one.images:
            continue
        where, n = f"rungs: {one.stage}: ", one.images
        if n != report.evaluation.images:
            yield f"{where}measured on {n} images, and evaluation names {report.evaluation.images}"
        if not {"failed", "undecided"} & {one.status, found.status} and one.status != found.status:
            yield f"{where}its status is {one.status!r}, and by its figures {found.status!r}"
        if one.agreeing is None:
            yield f"{where}lacks agreeing"
        earlier = [other.stage for other in report.rungs[:index]]
        if one.compared_to is not None and one.compared_to not in earlier:
            yield f"{where}compared_to: {one.compared_to!r} is no earlier stage"
        if index and one.tolerance is None and one.compared_to != original.stage:
            yield f"{where}lacks a tolerance; only the loss of slimming, against {original.stage}, has none"
        yield from (where + fault for fault in _impossible_counts(one, original))


def comparison_contradictions(report: ParityReport) -> Iterator[str]:
    """What the comparison says against the rungs of the two models that it compares. A message each. Needs scipy."""
    compared = report.comparison
    if compared is None:
        return
    rungs = {one.stage: one for one in report.rungs if one.images}
    for side in (compared.original, compared.candidate):
        one = rungs.get(side.stage)
        if one is None or one.images != compared.images:
            yield f"comparison: {side.stage} with {compared.images} images is no stage that ran"
        elif not _same(side.top1, one.top1) or not _same(side.top5, one.top5):
            yield f"comparison: {side.stage}: its top1 and top5 are not those of its rung"
    candidate = rungs.get(compared.candidate.stage)
    if compared.original.stage != report.rungs[0].stage:
        yield f"comparison: {compared.original.stage} is not the original, {report.rungs[0].stage}"
    elif candidate is not None and candidate.lost is not None and candidate.gained is not None:
        if not _same(compared.mcnemar, mcnemar(candidate.lost, candidate.gained)):
            counts = f"{candidate.lost} lost and {candidate.gained} gained"
            yield f"comparison: mcnemar: {compared.mcnemar} is not what {counts} give"
        if sum(each.original - each.candidate for each in compared.classes) != candidate.lost - candidate.gained:
            yield "comparison: classes: their changes do not add up to the drop"
    elif compared.mcnemar is not None or compared.classes:
        yield "comparison: speaks of labels that the rungs do not have"


def _same(one: float | None, other: float | None) -> bool:
    return one is other is None or (one is not None and other is not None and abs(one - other) <= _ROUNDING)


def _impossible_counts(one: Rung, original: Rung) -> Iterator[str]:
    n, lost, gained, agreeing = one.images, one.lost, one.gained, one.agreeing
    for name in ("top1", "top5"):
        value = getattr(one, name)
        if value is not None and abs(_count(value, n) - value * n / 100) > _ROUNDING * n:
            yield f"{name}: {value} % is no whole number of {n} images"
    if one.top1 is not None and one.top5 is not None and one.top1 > one.top5 + _ROUNDING:
        yield f"top1: {one.top1} is more than top5, {one.top5}"
    if agreeing is not None and agreeing + (lost or 0) + (gained or 0) > n:
        yield f"agreeing, lost, gained: {agreeing} + {lost or 0} + {gained or 0} are more than {n} images"
    if lost is None or gained is None:
        if one.top1 is not None or original.top1 is not None:
            yield "lacks lost and gained, and the images have labels"
        return
    if one.top1 is None or original.top1 is None or original.images != n:
        yield "lost, gained: come without the top1 of this stage and the original"
        return
    right, was_right = _count(one.top1, n), _count(original.top1, n)
    if was_right - right != lost - gained or lost > was_right or gained > n - was_right:
        yield f"lost, gained: {lost} and {gained} do not lead from top1 {original.top1} to {one.top1} on {n} images"
    if one.drop_interval is not None:
        low, high = drop_interval(lost, gained, n)
        if max(abs(one.drop_interval[0] - low), abs(one.drop_interval[1] - high)) > _ROUNDING:
            yield f"drop_interval: {list(one.drop_interval)} is not {[low, high]}, which follows from lost and gained"


def golden_contradictions(report: ParityReport, golden: Golden) -> Iterator[str]:
    """What of the report cannot be, if the golden images are the first of those it was measured on. A message each."""
    k, n = len(golden.labels), report.evaluation.images
    if k > n:
        yield f"golden.npz has {k} images, and evaluation names {n}"
        return
    labels = golden.labels if (golden.labels >= 0).all() else None
    answers = {"pytorch": golden.original_logits, "pytorch-slim": golden.slim_logits}
    for index, one in enumerate(report.rungs):
        if one.images != n or one.stage not in answers:
            continue
        logits = answers[one.stage]
        here = rung(one.stage, logits, labels, golden.original_logits, golden.original_logits, compared_to="pytorch")
        parts = {name: (getattr(here, name), getattr(one, name)) for name in ("agreeing", "lost", "gained")}
        for name in ("top1", "top5"):
            of_golden, of_all = getattr(here, name), getattr(one, name)
            if of_golden is not None and of_all is not None:
                parts[name] = _count(of_golden, k), _count(of_all, n)
        for name, (part, whole) in parts.items():
            if part is not None and whole is not None and not 0 <= whole - part <= n - k:
                yield f"rungs: {one.stage}: {name}: {whole} of {n} images, and golden.npz alone shows {part} of {k}"
        least = here.max_error or 0.0
        if index and one.max_error is not None and least > one.max_error * (1 + _ROUNDING):
            yield f"rungs: {one.stage}: max_error: {one.max_error:.3g}, and golden.npz alone shows {least:.3g}"


def overgenerous(manifest: Manifest, golden: Golden) -> Iterator[str]:
    """What a manifest allows its own files beyond what an export could have allowed for these logits. A message each."""
    for record in manifest.onnx:
        precision = stage_precision(record.stage)
        most = _most_allowed(precision, golden)
        if record.max_error is not None and record.max_error > most:
            yield f"onnx: {record.path}: max_error: {record.max_error:.3g} is more than an export allows here, {most:.3g}"
        least = MIN_AGREEMENT[precision]
        if record.max_error is not None and record.min_agreement < least:
            yield f"onnx: {record.path}: min_agreement: {record.min_agreement:g} is less than an export asks for, {least:g}"
    engines = manifest.engines_by_stage
    for one in manifest.rungs:
        most = _most_allowed(stage_precision(one.stage, engines.get(one.stage, manifest.engine).precision), golden)
        if one.tolerance is not None and one.tolerance > most:
            yield f"rungs: {one.stage}: tolerance: {one.tolerance:.3g} is more than an export allows here, {most:.3g}"
        if one.batches is not None and one.batches.tolerance > most:
            allowed = f"{one.batches.tolerance:.3g} is more than an export allows here, {most:.3g}"
            yield f"rungs: {one.stage}: batches: tolerance: {allowed}"


def _most_allowed(precision: Precision, golden: Golden) -> float:
    most = _SAMPLE * logit_tolerance(precision, golden.slim_logits)
    return max(_OLD_FP16_TOLERANCE, most) if precision == "fp16" else most


def _count(percent: float, images: int) -> int:
    return round(percent * images / 100)

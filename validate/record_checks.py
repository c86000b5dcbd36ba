"""Checks of what a bundle's records say: of one another, of the plan, of the golden arrays and pictures, of the engines."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict

from patchslim.errors import EXIT_PARITY, InputRejected
from patchslim.packages import missing
from patchslim.plan import SlimPlan
from patchslim.records import MAX_JSON_BYTES, StrictRecord, parse_record
from validate import bundle as files
from validate.build_recipe import MAX_RECIPE_BYTES, RECIPE, parse_recipe
from validate.bundle import parse_parity, read_file
from validate.engine_file import check_engine
from validate.manifest import Manifest
from validate.parity_records import ParityReport
from validate.verdict import Check, failed, not_checked

if TYPE_CHECKING:
    from validate.golden import Golden

_ROUNDING = 1e-6  # of a ratio that was written as a float


def check_records(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> Iterator[Check]:
    """``plan.json``, ``parity.json``, ``golden.npz`` and engines are what the manifest says; the build's gate was passed."""
    from validate.figures import contradictions, failed_stages

    say(files.PLAN)
    try:
        _check_plan(folder, manifest)
        yield Check(name="plan", subject=files.PLAN, status="passed", detail=f"{manifest.tokens_per_block} tokens per block")
    except InputRejected as error:
        yield failed("plan", files.PLAN, error)
    for name, engine in [(name, one) for one in manifest.engines_by_stage.values() for name in one.files]:
        try:
            if name not in [record.path for record in manifest.onnx]:
                check_engine(folder / name, engine.backend)
                detail = "not empty" if name.endswith(".bin") else f"the header is {engine.backend}'s"
                if engine.weights_from is not None:
                    detail += f"; without weights, which it is given from {engine.weights_from} when it is loaded"
                yield Check(name="engine", subject=name, status="passed", detail=detail)
        except InputRejected as error:
            yield failed("engine", name, error)
    yield from _check_recipe(folder, manifest)
    yield from check_sbom(folder, manifest)
    path = folder / files.PARITY
    try:
        report = read_parity(folder, manifest)
        for field in ("macs", "rungs", "engine", "engines", "evaluation"):
            if getattr(report, field) != getattr(manifest, field):
                raise InputRejected(f"{path}: {field} is not what manifest.json says")
        for fault in contradictions(report):
            raise InputRejected(f"{path}: {fault}")
    except InputRejected as error:
        yield failed("parity report", files.PARITY, error)
        return
    gate = f"gate of {report.gate.max_top1_drop:g} points"
    if stages := failed_stages(report):
        yield failed(
            "parity report", files.PARITY, f"{path}: the build did not pass its {gate}: {', '.join(stages)}", EXIT_PARITY
        )
        return
    detail = f"{len(report.rungs)} stages, {gate}, recomputed"
    yield Check(name="parity report", subject=files.PARITY, status="passed", detail=detail)
    if report.comparison is not None:
        yield _check_comparison(path, report)
    if any(record.path == files.LATENCY for record in manifest.files):
        yield _check_latency(folder, manifest)
    found = _check_golden(folder, manifest, report, say)
    yield found
    if not found.exit_code:
        yield _check_preprocessing(folder, manifest, say)


def _check_comparison(path: Path, report: ParityReport) -> Check:
    """What ``path``, the parity report, says of original and candidate follows from their rungs."""
    from validate.figures import comparison_contradictions

    if absent := missing(["scipy"]):
        return not_checked("comparison", files.PARITY, absent)
    if faults := list(comparison_contradictions(report)):
        return failed("comparison", files.PARITY, f"{path}: {faults[0]}")
    detail = f"on {report.comparison.images} images, McNemar's test recomputed" if report.comparison else ""
    return Check(name="comparison", subject=files.PARITY, status="passed", detail=detail)


def _check_latency(folder: Path, manifest: Manifest) -> Check:
    """``latency.json`` is well formed, and compares these two models."""
    from validate.latency_sheet import LatencySheet

    path = folder / files.LATENCY
    try:
        data = read_file(folder, manifest, files.LATENCY, files.MAX_RECORD_BYTES)
        sheet = parse_record(data, LatencySheet, "latency sheet", path)
        ratio = manifest.macs.dense / manifest.macs.slim if manifest.macs.slim else None
        for one in sheet.comparisons:
            if one.macs_ratio is not None and (ratio is None or abs(one.macs_ratio - ratio) > _ROUNDING * ratio):
                raise InputRejected(f"{path}: macs_ratio: {one.macs_ratio} is not manifest.json's dense / slim")
    except InputRejected as error:
        return failed("latency", files.LATENCY, error)
    return Check(name="latency", subject=files.LATENCY, status="passed", detail=f"{len(sheet.comparisons)} comparisons")


class _Component(StrictRecord):
    """A component of a bill of materials, as far as it is looked at."""

    model_config = ConfigDict(extra="ignore")

    name: str
    version: str = ""


class _Sbom(StrictRecord):
    """A CycloneDX document, as far as it is looked at."""

    model_config = ConfigDict(extra="ignore")

    bomFormat: Literal["CycloneDX"]  # noqa: N815 - CycloneDX's name
    components: list[_Component]


def check_sbom(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """``sbom.cdx.json`` names every tool of the manifest in its version."""
    if files.SBOM not in [file.path for file in manifest.files]:
        return
    path = folder / files.SBOM
    try:
        sbom = parse_record(read_file(folder, manifest, files.SBOM, files.MAX_RECORD_BYTES), _Sbom, "bill of materials", path)
        found = {(_normal(one.name), one.version) for one in sbom.components}
        for name, version in manifest.tools.items():
            if (_normal(name), version) not in found:
                raise InputRejected(f"{path}: lacks {name} {version}, a tool of manifest.json")
    except InputRejected as error:
        yield failed("bill of materials", files.SBOM, error)
        return
    detail = f"{len(sbom.components)} components, the manifest's tools among them"
    yield Check(name="bill of materials", subject=files.SBOM, status="passed", detail=detail)


def _normal(name: str) -> str:
    """A distribution's name as indexes have it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).casefold()


def _check_recipe(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """``recipe.json`` is for an ONNX file of this bundle, and says of it and its engine what the manifest says."""
    if RECIPE not in [file.path for file in manifest.files]:  # a bundle made before there were any
        return
    from validate.parity import stage_precision

    path = folder / RECIPE
    try:
        recipe = parse_recipe(read_file(folder, manifest, RECIPE, MAX_RECIPE_BYTES), path)
        built = (one for one in manifest.engines_by_stage.values() if one.backend in ("tensorrt", "tensorrt_rtx"))
        engine, expected = next(built, manifest.engine), recipe.expected
        stated: dict[str, tuple[object, object]] = {
            "input": (recipe.input, manifest.inputs[0]),
        }
        stages = [record.stage for record in manifest.onnx if record.path == recipe.onnx.path]
        if stages:
            stated["precision"] = expected.precision, stage_precision(stages[0])
        if engine.fused_attentions is not None:
            stated["expected.fused_attentions"] = (expected.fused_attentions, engine.fused_attentions)
        if engine.attentions is not None:
            stated["expected.attentions"] = (expected.attentions, engine.attentions)
        for field, (of_recipe, of_manifest) in stated.items():
            if of_recipe != of_manifest:
                raise InputRejected(f"{path}: {field}: {of_recipe}, and manifest.json says {of_manifest}")
        if recipe.onnx.path not in [record.path for record in manifest.onnx]:
            raise InputRejected(f"{path}: onnx: {recipe.onnx.path} is no ONNX file of manifest.json")
        if recipe.onnx not in manifest.files:
            raise InputRejected(f"{path}: onnx: size and SHA-256 of {recipe.onnx.path} are not those in manifest.json")
    except InputRejected as error:
        yield failed("recipe", RECIPE, error)
        return
    detail = f"builds {recipe.onnx.path}, {expected.precision}"
    yield Check(name="recipe", subject=RECIPE, status="passed", detail=detail)


def _check_golden(folder: Path, manifest: Manifest, report: ParityReport, say: Callable[[str], None]) -> Check:
    """``golden.npz`` is well formed, and what it shows is not more than what the report admits and the manifest allows."""
    from validate.figures import golden_contradictions, overgenerous

    say(files.GOLDEN)
    try:
        golden = read_golden(folder, manifest)
        for fault in golden_contradictions(report, golden):
            raise InputRejected(f"{folder / files.PARITY}: {fault}")
        for fault in overgenerous(manifest, golden):
            raise InputRejected(f"{folder / files.MANIFEST}: {fault}")
    except InputRejected as error:
        return failed("golden", files.GOLDEN, error)
    return Check(
        name="golden", subject=files.GOLDEN, status="passed", detail=f"{len(golden.labels)} images, as the figures say"
    )


def _check_preprocessing(folder: Path, manifest: Manifest, say: Callable[[str], None]) -> Check:
    """The manifest's rule makes the golden inputs of the pictures that lie beside them."""
    if not manifest.golden_images:
        detail = "not checked: the bundle, made before it had to, holds no pictures that its golden inputs were made of"
        return Check(name="preprocessing", subject=files.GOLDEN, status="not executed", detail=detail)
    if absent := missing(["PIL"]):
        return not_checked("preprocessing", files.GOLDEN, absent)
    from validate.golden_images import replay

    try:
        replay(folder, manifest, read_golden(folder, manifest), say)
    except InputRejected as error:
        return failed("preprocessing", files.GOLDEN, error)
    detail = f"the rule makes the golden inputs of {len(manifest.golden_images)} pictures, bit for bit"
    return Check(name="preprocessing", subject=files.GOLDEN, status="passed", detail=detail)


def check_engine_ran(manifest: Manifest, required: bool) -> Iterator[Check]:
    for stage, engine in manifest.engines_by_stage.items():
        if engine.status != "not executed":
            continue
        detail = f"the engine ({engine.backend} for {', '.join(engine.targets) or 'no target'}) never ran where it was built"
        if required:
            yield failed("engine ran", stage, f"{detail}, and --require-executed asks for that", EXIT_PARITY)
        else:
            yield Check(name="engine ran", subject=stage, status="not executed", detail=detail)


def _check_plan(folder: Path, manifest: Manifest) -> None:
    """Raise ``InputRejected`` unless the plan is valid and all that the manifest says of it follows from it."""
    path = folder / files.PLAN
    data = read_file(folder, manifest, files.PLAN, MAX_JSON_BYTES)
    if next(file.sha256 for file in manifest.files if file.path == files.PLAN) != manifest.plan_digest:
        raise InputRejected(f"{path}: its SHA-256 is not manifest.json's plan_digest")
    plan = parse_record(data, SlimPlan, "plan", path)
    calibration = plan.origin.calibration
    derived: dict[str, tuple[object, object]] = {
        "model": (plan.model, manifest.model),
        "tokens per block": (plan.counts, manifest.tokens_per_block),
        "macs.dense": (plan.dense_macs(), manifest.macs.dense),
        "macs.slim": (plan.macs(manifest.macs.layout), manifest.macs.slim),
    }
    for one in manifest.engines:
        derived[f"engines.{one.name}.macs"] = (plan.dense_macs(), plan.macs(one.macs.layout)), (one.macs.dense, one.macs.slim)
    if (stated := manifest.calibration) is not None:
        derived["calibration"] = (
            None if calibration is None else (calibration.data, calibration.images, calibration.fingerprint),
            (stated.data, stated.images, stated.fingerprint),
        )
    for field, (of_plan, of_manifest) in derived.items():
        if of_plan != of_manifest:
            raise InputRejected(f"{path}: {field} of the plan: {of_plan}, and manifest.json says {of_manifest}")


def read_parity(folder: Path, manifest: Manifest) -> ParityReport:
    return parse_parity(folder, read_file(folder, manifest, files.PARITY, files.MAX_RECORD_BYTES))


def read_golden(folder: Path, manifest: Manifest) -> Golden:
    from validate.golden import most_bytes, parse_golden

    size, classes = manifest.preprocessing.input_size, manifest.classes
    data = read_file(folder, manifest, files.GOLDEN, most_bytes(size, classes))
    return parse_golden(data, folder / files.GOLDEN, size, classes)

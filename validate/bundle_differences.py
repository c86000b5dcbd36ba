"""What differs between two bundles, topic by topic, in words. Neither is trusted, and no model of theirs is run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import Field

from patchslim.plan import SlimPlan
from patchslim.records import MAX_JSON_BYTES, StrictRecord, parse_record
from validate.bundle import PLAN, read_file
from validate.check import check_bundle
from validate.engine_runs import EngineChoice
from validate.manifest import Manifest, TensorSpec
from validate.parity_records import EngineRecord, Rung

_MOST_FILES = 20  # that are named; more are counted


class Difference(StrictRecord):
    """One thing that is not the same."""

    topic: str
    said: str


class BundleDiff(StrictRecord):
    """How ``second`` differs from ``first``."""

    first: str
    second: str
    differences: list[Difference]
    same_files: bool = Field(description="every file of the one is in the other, byte for byte")


def compare_bundles(first: Path, second: Path) -> BundleDiff:
    """Check both bundles' files and records, and say what differs.

    Raises ``InputRejected`` or ``ParityFailed`` where one is broken, as ``check_bundle`` finds.
    """
    manifests = [_checked(folder) for folder in (first, second)]
    one, other = manifests
    before, after = _plan(first, one), _plan(second, other)
    topics: dict[str, Iterable[str]] = {
        "model": _model(one, other),
        "plan": () if one.plan_digest == other.plan_digest else _plans(before, after),
        "cost": _cost(one, other),
        "accuracy": _accuracy(one, other),
        "engine": _engine(one, other),
        "interface": _interface(one, other),
        "tools": _tools(one.tools, other.tools),
        "manifest": _others(one, other),
        "files": _files(one, other),
    }
    found = [Difference(topic=topic, said=said) for topic, all_said in topics.items() for said in all_said]
    return BundleDiff(
        first=str(first), second=str(second), differences=found, same_files=not any(one.topic == "files" for one in found)
    )


def _checked(folder: Path) -> Manifest:
    verdict = check_bundle(folder, engines=EngineChoice(()))
    verdict.raise_if_failed()
    assert verdict.manifest is not None
    return verdict.manifest


def _plan(folder: Path, manifest: Manifest) -> SlimPlan:
    return parse_record(read_file(folder, manifest, PLAN, MAX_JSON_BYTES), SlimPlan, "plan", folder / PLAN)


def _values(pairs: Mapping[str, tuple[object, object]]) -> Iterator[str]:
    """A line for every pair that differs."""
    for name, (before, after) in pairs.items():
        if before != after:
            yield f"{name}: {_shown(before)} -> {_shown(after)}"


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _model(one: Manifest, other: Manifest) -> Iterator[str]:
    yield from _values({"name of the bundle": (one.name, other.name), "model": (one.model, other.model)})
    yield from _values({"arguments of the model": (one.model_args or None, other.model_args or None)})
    yield from _values({"licence": (one.weights.license, other.weights.license)})
    if one.weights.sha256 != other.weights.sha256:
        yield f"other weights: {one.weights.source} ({_digest(one.weights.sha256)}) -> " + (
            f"{other.weights.source} ({_digest(other.weights.sha256)})"
        )
    elif one.weights.source != other.weights.source:
        yield f"the same weights from another place: {one.weights.source} -> {other.weights.source}"


def _digest(sha256: str | None) -> str:
    return "no digest" if sha256 is None else f"SHA-256 {sha256[:12]}..."


def _plans(before: SlimPlan, after: SlimPlan) -> Iterator[str]:
    yield from _values(
        {
            "asked for": (_asked(before), _asked(after)),
            "score": (before.origin.score, after.origin.score),
            "dropped tokens": (before.mode, after.mode),
            "calibration images": (_calibrated(before), _calibrated(after)),
        }
    )
    if before.counts != after.counts:
        yield f"tokens per block: {_shown(before.counts)} -> {_shown(after.counts)}"
    elif before.kept != after.kept:
        blocks = [number for number, (a, b) in enumerate(zip(before.kept, after.kept, strict=False)) if a != b]
        yield f"as many tokens, but others, in blocks {_shown(blocks)}"
    yield from _values({"patches that a block does without": (_gone(before), _gone(after))})
    fitted = [plan.weights and plan.weights.sha256 for plan in (before, after)]
    if fitted[0] != fitted[1]:
        fits = [plan.weights.fit if plan.weights else "none" for plan in (before, after)]
        yield f"other fitted weights: {fits[0]} -> {fits[1]}"


def _gone(plan: SlimPlan) -> str:
    if plan.merged_into is not None:
        return "merged"
    return "dropped" if min(plan.counts) < plan.tokens else "there are none"


def _asked(plan: SlimPlan) -> str:
    return f"{plan.origin.criterion} {plan.origin.value:g}"


def _calibrated(plan: SlimPlan) -> str:
    found = plan.origin.calibration
    return "none" if found is None else f"{found.images} of {found.data} ({found.fingerprint[:12]})"


def _cost(one: Manifest, other: Manifest) -> Iterator[str]:
    if one.macs != other.macs:
        before, after = one.macs, other.macs
        change = 100 * (after.slim / before.slim - 1) if before.slim else 0.0
        yield (
            f"{before.slim / 1e9:.4g} -> {after.slim / 1e9:.4g} GMACs an image ({change:+.1f} %), "
            f"{before.reduction:.1%} -> {after.reduction:.1%} removed of the dense model's"
        )
        yield from _values({"projections laid": (before.layout, after.layout)})


def _accuracy(one: Manifest, other: Manifest) -> Iterator[str]:
    if one.evaluation != other.evaluation:
        before, after = one.evaluation, other.evaluation
        images = [f"{each.images} images of {each.data}" for each in (before, after)]
        yield f"measured on other images, so that top-1 does not compare: {images[0]} -> {images[1]}"
    rungs = {rung.stage: rung for rung in one.rungs}
    others = {rung.stage: rung for rung in other.rungs}
    for stage in dict.fromkeys([*rungs, *others]):
        before_rung, after_rung = rungs.get(stage), others.get(stage)
        if before_rung != after_rung:
            yield f"{stage}: {_measured(before_rung)} -> {_measured(after_rung)}"


def _measured(rung: Rung | None) -> str:
    """A stage's accuracy with the interval of its drop."""
    if rung is None:
        return "not there"
    if rung.status == "not executed":
        return "not executed"
    said = "no labels" if rung.top1 is None else f"top-1 {rung.top1:.2f} %"
    if rung.drop_interval is not None and rung.top1_drop is not None:
        low, high = rung.drop_interval
        said += f", drop {rung.top1_drop:.2f} (95 % CI {low:.2f} to {high:.2f})"
    if rung.max_error is not None:
        said += f", logits off by {rung.max_error:.2g} at most"
    return said if rung.status == "passed" else f"{said}, {rung.status}"


def _engine(one: Manifest, other: Manifest) -> Iterator[str]:
    if one.engines or other.engines:
        yield from _engines(one, other)
        return
    before, after = one.engine, other.engine
    yield from _values(
        {
            "backend": (f"{before.backend} {before.version}", f"{after.backend} {after.version}"),
            "built for": (before.targets, after.targets),
            "precision": (one.precision, other.precision),
            "attentions fused": (_fused(before), _fused(after)),
            "status": (before.status, after.status),
        }
    )


def _engines(one: Manifest, other: Manifest) -> Iterator[str]:
    """Where a bundle has several: which there are, and what differs of those that both have."""
    befores, afters = ({_engine_name(engine): engine for engine in each.engines_by_stage.values()} for each in (one, other))
    yield from _values({"engines": (list(befores), list(afters))})
    for name in befores:
        if name in afters:
            before, after = befores[name], afters[name]
            yield from _values(
                {
                    f"{name}, version": (f"{before.backend} {before.version}", f"{after.backend} {after.version}"),
                    f"{name}, built for": (before.targets, after.targets),
                    f"{name}, precision": (before.precision, after.precision),
                    f"{name}, attentions fused": (_fused(before), _fused(after)),
                    f"{name}, status": (before.status, after.status),
                }
            )


def _engine_name(engine: EngineRecord) -> str:
    """As it is asked for."""
    return {"onnxruntime": "ort", "tensorrt": "trt", "tensorrt_rtx": "trt"}.get(engine.backend, engine.backend)


def _fused(engine: EngineRecord) -> str:
    return "not known" if engine.fused_attentions is None else f"{engine.fused_attentions} of {engine.attentions}"


def _interface(one: Manifest, other: Manifest) -> Iterator[str]:
    yield from _values(
        {
            "input": (_tensors(one.inputs), _tensors(other.inputs)),
            "output": (_tensors(one.outputs), _tensors(other.outputs)),
            **{
                f"preprocessing, {name}": (getattr(one.preprocessing, name), getattr(other.preprocessing, name))
                for name in ("interpolation", "crop_pct", "crop_mode", "mean", "std")
            },
            "preprocessing as a rule": (_ruled(one), _ruled(other)),
        }
    )
    if one.labels != other.labels:
        changed = sum(a != b for a, b in zip(one.labels, other.labels, strict=False))
        yield f"labels: {len(one.labels)} -> {len(other.labels)}, {changed} of the same place named otherwise"


def _ruled(manifest: Manifest) -> str:
    return "none" if manifest.preprocessing.rule is None else "given"


def _tensors(specs: Sequence[TensorSpec]) -> str:
    return "; ".join(f"{spec.name} {spec.dtype} [{', '.join(map(str, spec.shape))}]" for spec in specs)


def _tools(one: Mapping[str, str], other: Mapping[str, str]) -> Iterator[str]:
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield f"{name}: {one.get(name, 'not there')} -> {other.get(name, 'not there')}"


#: Fields of a manifest that the other topics speak of.
_TOLD = {"name", "model", "model_args", "weights", "plan_digest", "tokens_per_block", "macs", "evaluation", "rungs"}
_TOLD |= {"engine", "engines", "precision", "inputs", "outputs", "preprocessing", "labels", "tools", "files"}


def _others(one: Manifest, other: Manifest) -> Iterator[str]:
    """What else the manifests do not say alike, field by field."""
    for name in Manifest.model_fields:
        before, after = getattr(one, name), getattr(other, name)
        if name not in _TOLD and before != after:
            plain = all(isinstance(value, str | int | float | None) for value in (before, after))
            yield f"{name}: {_shown(before)} -> {_shown(after)}" if plain else f"{name}: is not the same"


def _files(one: Manifest, other: Manifest) -> Iterator[str]:
    before, after = ({file.path: file for file in manifest.files} for manifest in (one, other))
    groups = {
        "only in the first": [before[name] for name in sorted({*before} - {*after})],
        "only in the second": [after[name] for name in sorted({*after} - {*before})],
        "other bytes": [after[name] for name in sorted({*before} & {*after}) if before[name].sha256 != after[name].sha256],
    }
    for group, files in groups.items():
        for file in files[:_MOST_FILES]:
            sizes = f"{file.size} bytes"
            if group == "other bytes" and before[file.path].size != file.size:
                sizes = f"{before[file.path].size} -> {file.size} bytes"
            yield f"{group}: {file.path} ({sizes})"
        if len(files) > _MOST_FILES:
            yield f"{group}: {len(files) - _MOST_FILES} more"

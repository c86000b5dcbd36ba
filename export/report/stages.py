"""The stages of the report: pictures of the images that the models answer most differently, and the page itself."""

from __future__ import annotations

from pathlib import Path

from export.cache import tool_versions
from export.report.page import REPORT, ReportFacts, report_html
from export.source import ExportSource
from export.stages import Workspace
from patchslim.plan import SlimPlan
from patchslim.records import atomic_path
from validate.parity_records import Comparison

#: Pixels of the longer side of a picture on the page.
_SIDE = 160


def worst_images(source: ExportSource, comparison: Comparison | None, work: Workspace) -> dict[int, Path]:
    """Small PNG files of the images that a comparison lists, by their place among the held-out images."""
    places = [one.image for one in comparison.worst] if comparison else []
    if not places:
        return {}
    folder = work.cache.path("worst", images=source.evaluation_fingerprint, places=places, side=_SIDE)

    def build(part: Path) -> None:
        images = source.evaluation_images
        images.samples.transform = None
        for place in places:
            picture = images.samples[images.indices[place]][0].convert("RGB")
            picture.thumbnail((_SIDE, _SIDE))
            picture.save(part / f"{place}.png", format="PNG")

    work.cache.make(folder, build)
    return {int(path.stem): path for path in sorted(folder.glob("*.png"))}


def report_page(facts: ReportFacts, work: Workspace) -> Path:
    """The page of ``facts`` as a file."""
    folder = work.cache.path(
        "report",
        name=facts.name,
        plan=facts.plan.model_dump(mode="json"),
        parity=facts.parity.model_dump(mode="json"),
        engines=[(one.summary(), one.kernels, one.dense_kernels, one.fused) for one in (facts.engine, *facts.others)],
        labels=facts.labels,
        latency=facts.latency and facts.latency.model_dump(mode="json"),
        pictures=[work.facts.digest(path) for path in (facts.kept_patches, *facts.worst.values())],
        provenance=facts.provenance,
    )

    def build(part: Path) -> None:
        with atomic_path(part / REPORT) as path:
            path.write_text(report_html(facts, work.cache.read), encoding="utf-8")

    work.cache.make(folder, build)
    return folder / REPORT


def provenance(source: ExportSource, plan: SlimPlan) -> list[tuple[str, str]]:
    """What the bundle was made of: rows of the report."""
    model, calibration, evaluation = source.model, plan.origin.calibration, source.evaluation_record()
    arguments = " ".join(f"{name}={value}" for name, value in model.arguments.items())
    rows = [
        ("model", " ".join(filter(None, (model.architecture, arguments)))),
        ("weights", f"{model.weights}, SHA-256 {model.weights_sha256}"),
        ("plan", f"{plan.origin.score}, {plan.origin.criterion} {plan.origin.value:g}, seed {plan.origin.seed}"),
    ]
    if calibration is not None:
        rows.append(("calibrated on", f"{calibration.images} images of {calibration.data}, SHA-256 {calibration.fingerprint}"))
    rows.append(
        (
            "measured on",
            f"{evaluation.images} images of {evaluation.data}, {evaluation.split}, SHA-256 {evaluation.fingerprint}",
        )
    )
    return [*rows, ("made with", ", ".join(f"{name} {version}" for name, version in tool_versions().items()))]

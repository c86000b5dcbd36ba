"""The page of a bundle: verdict, ladder, comparison, patches, speed, provenance and next steps, as one HTML file."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.cache import tool_versions
from export.engines.base import EngineResult
from export.report.charts import accuracy_chart, class_chart, ladder_chart, latency_chart, name_of, walk_chart
from export.stage_names import ENGINE
from patchslim.packages import wheel_command
from patchslim.plan import SlimPlan
from validate.explain import verdict_of, what_it_proves
from validate.latency_sheet import LatencySheet
from validate.parity_records import Comparison, Disagreement, ParityReport

REPORT = "report.html"


@dataclass(frozen=True)
class ReportFacts:
    """What the page tells.

    ``kept_patches`` is a PNG file, ``worst`` are such by place among the evaluation images, ``provenance`` rows of a table.
    """

    name: str
    plan: SlimPlan
    parity: ParityReport
    engine: EngineResult
    others: Sequence[EngineResult]
    labels: list[str]
    latency: LatencySheet | None
    kept_patches: Path
    worst: Mapping[int, Path]
    provenance: list[tuple[str, str]]


def report_html(facts: ReportFacts, read: Callable[[Path], bytes] = Path.read_bytes) -> str:
    """The page; the same facts give the same text. ``read`` reads its pictures."""
    from jinja2 import ChoiceLoader, Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    import slimming.report

    # Autoescape is what makes names from outside harmless; the plots alone are markup, and matplotlib escapes their text.
    folders = [FileSystemLoader(Path(__file__).parent), FileSystemLoader(Path(str(slimming.report.__file__)).parent)]
    templates = Environment(
        loader=ChoiceLoader(folders), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    parity, sheet, engine = facts.parity, facts.latency, facts.engine
    charts = {
        "ladder": ladder_chart(parity),
        "accuracy": accuracy_chart(parity),
        "classes": class_chart(parity.comparison.classes, facts.labels) if parity.comparison else "",
        "latency": latency_chart(sheet) if sheet else "",
        "walk": walk_chart(facts.plan.origin.walk, parity.macs.dense),
    }
    helpers: dict[str, Any] = {
        "percent": lambda value: "" if value is None else f"{value:.2f}\N{NARROW NO-BREAK SPACE}%",
        "number": lambda value: "" if value is None else f"{value:.2f}",
        "small": lambda value: "" if value is None else f"{value:.2g}",
        "amount": lambda macs: f"{macs / 1e9:.3f} G" if macs >= 1e8 else f"{macs / 1e6:.2f} M",
    }
    return templates.get_template("page.html").render(
        name=facts.name,
        parity=parity,
        plan=facts.plan,
        engine=engine,
        engines=parity.engines,
        compared=parity.comparison,
        differing=_differing(parity),
        headline=headline(parity, sheet),
        verdict=verdict_of(parity.rungs),
        proves=what_it_proves(parity.rungs, parity.gate.max_top1_drop, parity.gate.rule),
        charts={name: Markup(svg) for name, svg in charts.items()},
        fastest=max(sheet.comparisons, key=lambda one: one.batch) if sheet and sheet.comparisons else None,
        sheet=sheet,
        worst=[_worst(one, facts, read) for one in parity.comparison.worst] if parity.comparison else [],
        kept=_data_url(read(facts.kept_patches)),
        kernels=[row for one in (engine, *facts.others) for row in _kernels(one)],
        provenance=facts.provenance,
        check_command=_check_command(facts.name),
        next_step=_next_step(parity, [engine, *facts.others]),
        **helpers,
    )


def headline(parity: ParityReport, sheet: LatencySheet | None) -> str:
    """What was saved and what it cost, in a sentence."""
    said = [f"{parity.macs.reduction:.1%} of the multiply-accumulates removed"]
    served = [one for one in parity.rungs if one.images]
    served = served[: next((at + 1 for at, one in enumerate(served) if one.stage == ENGINE), None)]  # of several, the first
    last = served[-1]
    if last.top1 is not None and last.top1_drop is not None and last.drop_interval is not None:
        low, high = last.drop_interval
        lost = f"{last.top1_drop:.2f} points lost" if last.top1_drop >= 0 else f"{-last.top1_drop:.2f} points gained"
        said.append(f"at {last.top1:.2f} % top-1, {lost} (95 % interval of the loss {low:.2f} to {high:.2f})")
    elif last.agreement is not None:
        said.append(f"answering {last.agreement:.2f} % of the images as the original does")
    if sheet is not None and sheet.comparisons:
        fastest = max(sheet.comparisons, key=lambda one: one.batch)
        said.append(f"{fastest.speedup:.2f} times as fast on one CPU thread")
    return ", ".join(said) + "."


def _differing(parity: ParityReport) -> str:
    compared: Comparison | None = parity.comparison
    if compared is None:
        return ""
    rung = next(one for one in parity.rungs if one.stage == compared.candidate.stage)
    count = rung.images - (rung.agreeing or 0)
    changed = "" if rung.lost is None else f": {rung.lost} lost, {rung.gained} gained"
    return f"{count} of {rung.images}{changed}"


def _worst(one: Disagreement, facts: ReportFacts, read: Callable[[Path], bytes]) -> dict[str, Any]:
    names = facts.labels
    picture = facts.worst.get(one.image)
    return {
        "image": one.image,
        "picture": None if picture is None else _data_url(read(picture)),
        "label": None if one.label is None else name_of(one.label, names),
        "original": name_of(one.original, names),
        "candidate": name_of(one.candidate, names),
        "divergence": one.divergence,
    }


def _check_command(name: str) -> str:
    """Started beside the bundle: Python imports from the folder that it is started in, and this one is not checked yet."""
    folder = shlex.quote(name)
    wheel = wheel_command("edge", tool_versions().get("patchslim", "VERSION"))
    return f"(cd {folder} && sha256sum -c SHA256SUMS)\n{wheel}\npython -m validate.run {folder}"


def _kernels(engine: EngineResult) -> list[tuple[str, int | None, int | None, int | None, int]]:
    """Kernels, those of the dense model, and fused attentions by target, of how many; none where the backend does not tell."""
    if not engine.kernels and not engine.fused:
        return []
    return [
        (target, engine.kernels.get(target), engine.dense_kernels.get(target), engine.fused.get(target), engine.attentions)
        for target in engine.targets
    ]


def _next_step(parity: ParityReport, engines: Sequence[EngineResult]) -> str:
    if not parity.passed:
        return "This bundle did not pass its gate, and is not to be served."
    if idle := [one for one in engines if not one.executed]:
        which = "The engine" if len(engines) == 1 else f"The engine of {' and '.join(one.backend for one in idle)}"
        return (
            f"{which} was built for another machine and has not run yet: check it there before it serves. There, with the "
            "extra rtx or trt beside edge, the same command runs it on the golden images; with --build it makes an engine "
            "of its own first, by recipe.json."
        )
    return ""


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")

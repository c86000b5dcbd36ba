"""The begin of a run: everything that its options can be refused for, before anything slow."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from export.cache import StageCache
from export.engines.base import ALL, QUANTISED
from export.engines.build import choose_backend
from export.engines.support import engines_here
from export.engines.tensorrt_build import check_settings
from export.latency.budget_stages import known_latency_table, needs_latency_table
from export.options import ExportOptions
from export.places import check_places
from export.publication import check_place
from export.quantised_graphs import ensure_quantiser
from export.source import ExportSource
from export.stage_names import ALONE, StageNames
from export.stages import EngineRequest, Workspace, find_plan, plan_folder
from patchslim import cuda
from patchslim.choices import EngineName
from patchslim.errors import ParityFailed, Unavailable
from patchslim.progress import Reporter
from patchslim.targets import target_for


@dataclass(frozen=True)
class Begun:
    """A run whose options were checked: they name every engine, the first to be served; ``left_out`` says why not all."""

    options: ExportOptions
    requests: list[EngineRequest]
    source: ExportSource
    work: Workspace
    left_out: dict[EngineName, str]


def begin(options: ExportOptions) -> Begun:
    """Check what the options ask for before anything slow: the bundle's place, the engines, the model and the images."""
    options, left_out = _with_engines_here(options)
    options.check()
    check_places(options)
    check_place(options.bundle)
    options.check_inputs()
    reporter = Reporter()
    work = Workspace(StageCache(options.work_folder, reporter.say), reporter)
    work.cache.check()
    requests = [_request(options.for_engine(engine), options.primary) for engine in options.engines]
    return Begun(options, requests, ExportSource(options, work.facts, reporter.say), work, left_out)


def _with_engines_here(options: ExportOptions) -> tuple[ExportOptions, dict[EngineName, str]]:
    """``options`` with names for ``--engine all``, and why engines were left out. Raises ``Unavailable`` where none works."""
    if options.engine != ALL:
        return options, {}
    here, left_out = engines_here(options.precision)
    if not here:
        raise Unavailable("--engine all: none works here: " + "; ".join(f"{name}: {why}" for name, why in left_out.items()))
    return dataclasses.replace(options, engine=",".join(here)), left_out


def _request(options: ExportOptions, first: EngineName) -> EngineRequest:
    """What to build of one engine, beside the ``first`` of its bundle. Raises as ``choose_backend`` does, ``ParityFailed``."""
    backend = choose_backend(options.primary, options.targets, options.engine_precision)
    if options.builder_settings is not None:
        check_settings(backend, options.builder_settings)
    if options.engine_precision in QUANTISED:
        ensure_quantiser(options.primary, options.engine_precision)
    if options.require_executed and backend.ahead_of_time and target_for(cuda.local_target(), backend.targets) is None:
        raise ParityFailed(
            f"--require-executed: an engine for {', '.join(backend.targets)} cannot run on this machine; "
            "run this command on one with such a GPU, or leave the option out here and give it to validate.run there"
        )
    names = ALONE if options.primary == first else StageNames.beside(options.primary, first)
    request = EngineRequest(options.primary, backend, options.engine_precision, options.batch_profile, names, options.hint)
    profiles = options.batch_profiles if len(options.batch_profiles) > 1 else ()
    return dataclasses.replace(request, profiles=profiles, settings=options.builder_settings)


def describe(options: ExportOptions) -> dict[str, object]:
    """What ``export_bundle`` would do with these options, and whether its plan is in the work folder already.

    Nothing is made or kept. Raises the ``PatchslimError`` that the run would meet before its first slow stage.
    """
    begun = begin(options)
    options, source, work, request = begun.options, begun.source, begun.work, begun.requests[0]
    if options.plan is not None or options.dense:
        find_plan(options, source, None, work)  # read and compared with the model
        plan = str(options.plan or "dense")
    else:
        table = known_latency_table(options, source, work)
        measured = table is not None or not needs_latency_table(options)
        found = measured and plan_folder(options, source, table, work).is_dir()
        plan = "found already" if found else "to be searched"
    described = {
        "model": source.model.architecture,
        "weights": source.model.weights,
        "preprocessing": source.model.data_config,
        "calibration": source.calibration.describe(),
        "evaluation": source.evaluation.describe(),
        "plan": plan,
        **_described(options, request),
        "work": str(options.work_folder),
        "bundle": str(options.bundle),
    }
    if len(begun.requests) > 1:
        described["engines"] = [
            {"engine": one.engine, **_described(options.for_engine(one.engine), one), "layout": one.layout}
            for one in begun.requests
        ]
    if begun.left_out:
        described["left_out"] = begun.left_out
    return described


def _described(options: ExportOptions, request: EngineRequest) -> dict[str, object]:
    return {
        "backend": request.backend.name,
        "targets": list(request.backend.targets),
        "precision": "auto" if options.chooses_precision else request.precision,
    }

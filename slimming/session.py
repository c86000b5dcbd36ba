"""From options to a model on a device, its transform, its calibration images and its plan: what every command does first."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from patchslim.choices import Layout
from patchslim.errors import InputRejected, Unavailable
from patchslim.progress import Reporter, StageProgress
from slimming.models.vit_reader import LoadedVit
from slimming.options import ModelOptions
from slimming.search.distillation import check_distilled

if TYPE_CHECKING:
    from slimming.api import FoundPlan, PlanFinder
    from slimming.data.source import ImageSet, Transform
    from slimming.distributed import ProcessGroup
    from slimming.models.loading import LoadedModel
    from slimming.onnx_models.loading import LoadedGraph
    from slimming.search.costs import Cost

LoadedT_co = TypeVar("LoadedT_co", bound=LoadedVit, covariant=True)


@dataclass(frozen=True)
class SlimmingSession(Generic[LoadedT_co]):
    """A loaded model, its evaluation transform, and its calibration images."""

    loaded: LoadedT_co
    transform: Transform
    calibration: ImageSet


def open_session(
    options: ModelOptions,
    evaluated: ImageSet | None = None,
    process_group: ProcessGroup | None = None,
    *,
    say: Callable[[str], None] | None = None,
) -> SlimmingSession[LoadedModel]:
    """Return a session with the timm model that the options name.

    ``evaluated`` are the images to be measured on, if any, whose classes are the model's. Every process of ``process_group``
    has a device of its own. ``say`` is told what a user has to know: which weights were taken, files left out; None: on stderr,
    by the primary process. Raises ``PatchslimError`` with the next step in its message.
    """
    options.check()
    import torch
    from timm.data import create_transform
    from timm.layers import set_fused_attn

    from slimming.models.loading import load_model, parse_arguments
    from slimming.models.reader import check_supported

    if options.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("--device cuda: PyTorch sees no CUDA device here; pass --device cpu")
    set_fused_attn(True)
    say = say or Reporter(quiet=process_group is not None and not process_group.is_primary).say
    calibration = calibration_images(options)
    labels = class_names(options, say) if evaluated is None else evaluated.labels
    if len(labels) == 1:
        raise InputRejected(f"{options.data}: has one class only, so every answer would be right")
    loaded = load_model(
        options.model,
        weights=options.weights,
        arguments=parse_arguments(options.model_arg),
        preprocessing=options.preprocessing(),
        classes=len(labels) or None,
        seed=options.seed,
        ema=options.ema,
    )
    for note in dict.fromkeys((*loaded.notes, *calibration.notes, *(evaluated.notes if evaluated else ()))):
        say(note)
    check_supported(loaded.module, options.model)
    classes = int(loaded.module.num_classes)
    if labels and len(labels) != classes:
        raise InputRejected(
            f"{options.data} has {len(labels)} classes, the model {classes}: "
            "pass data of the model's classes, or --model-arg num_classes=N with weights that fit"
        )
    device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    if device == "cuda" and process_group is not None and process_group.size > 1:
        device = f"cuda:{torch.cuda.current_device()}"
    loaded.module.to(device)
    return SlimmingSession(loaded, create_transform(**loaded.data_config), calibration)


def open_graph_session(options: ModelOptions, path: Path, evaluated: ImageSet | None = None) -> SlimmingSession[LoadedGraph]:
    """Return a session with the ONNX file at ``path`` as its model; the options name the images alone.

    ``evaluated`` are the images to be measured on, if any. Raises ``PatchslimError`` with the next step in its message.
    """
    from timm.data import create_transform

    from slimming.onnx_models.loading import load_graph

    loaded = load_graph(path, options.preprocessing(), evaluated)
    calibration, reporter = calibration_images(options), Reporter()
    for note in dict.fromkeys((*calibration.notes, *(evaluated.notes if evaluated else ()))):
        reporter.say(note)
    return SlimmingSession(loaded, create_transform(**loaded.data_config), calibration)


def class_names(options: ModelOptions, say: Callable[[str], None] | None = None, *, graph: bool = False) -> list[str]:
    """Return the names of the classes, in the order of the model's answers; empty where nothing names them.

    ``graph`` says that the model is an ONNX file, whose weights name none. ``say`` is told where two orders had to be taken for
    one; None: on stderr. Raises ``InputRejected`` where names contradict.
    """
    from slimming.data.classes import agreed_classes, read_class_map
    from slimming.data.source import class_names_of
    from slimming.models.loading import class_names as of_weights

    if options.class_map is not None:
        return read_class_map(options.class_map)
    addresses = [options.data, options.calibration_data, options.train_data if options.finetune_epochs else None]
    named = [(address, class_names_of(address)) for address in dict.fromkeys(addresses) if address is not None]
    trained = [] if graph else of_weights(options.model, options.weights)
    return agreed_classes(trained, named, say or Reporter().say)


def calibration_images(options: ModelOptions) -> ImageSet:
    """Return the images that the plan is made from, none of which is ever evaluated on."""
    from slimming.data.source import calibration_set

    address = options.calibration_data or options.data
    images = calibration_set(address, options.calibration_images, options.seed, apart=_apart(address, options.data))
    if options.fit == "distill":
        check_distilled(images.address, len(images))
    return images


def calibration_is_labelled(options: ModelOptions, session: SlimmingSession[LoadedVit]) -> bool:
    """Return whether the calibration images' classes are the model's, in the order of its answers."""
    from slimming.onnx_models.loading import LoadedGraph

    labels = session.calibration.labels
    try:
        names = class_names(options, lambda note: None, graph=isinstance(session.loaded, LoadedGraph))
    except InputRejected:
        return False
    return bool(labels) and list(labels) == list(names)


def evaluation_images(options: ModelOptions, count: int | None, classes: Sequence[str] = ()) -> ImageSet:
    """Return ``count`` held-out images (None: all), of all of ``--data`` where plans are made from other images.

    ``classes`` are the names of the model's classes, in order.
    """
    from slimming.data.source import evaluation_set

    others = [options.calibration_data or options.data]
    if options.finetune_epochs:
        others.append(options.train_data or options.data)
    return evaluation_set(options.data, count, classes, apart=all(_apart(address, options.data) for address in others))


def _apart(address: str, evaluated: str) -> bool:
    """Whether no image of ``address`` can be one that is evaluated on."""
    here, there = Path(address).resolve(), Path(evaluated).resolve()
    return here != there and here not in there.parents and there not in here.parents


def training_images(options: ModelOptions) -> ImageSet:
    """Return the labelled images to fine-tune on, none of which is ever evaluated on."""
    from slimming.data.digits import DEFAULT_LENGTH
    from slimming.data.source import calibration_set

    address = options.train_data or options.data
    everything = DEFAULT_LENGTH["train"] if address == "digits" else sys.maxsize
    count = everything if options.train_images == "all" else options.train_images
    classes = class_names(options, lambda note: None)  # said already
    return calibration_set(address, count, options.seed, apart=_apart(address, options.data), classes=classes)


def open_finder(
    options: ModelOptions,
    session: SlimmingSession[LoadedVit],
    progress: StageProgress,
    process_group: ProcessGroup | None = None,
) -> PlanFinder:
    """Return a finder on the session's calibration images, which the caller closes."""
    from slimming.api import FinderSettings, PlanFinder
    from slimming.distributed import SINGLE_PROCESS

    reader = session.loaded.reader
    request = options.request().for_model(fixed_head=reader.head.fixed, refusals=reader.refusals)
    settings = FinderSettings(
        mode=options.mode,
        magnitudes=request.needs_magnitudes,
        seed=options.seed,
        process_group=process_group or SINGLE_PROCESS,
        progress=progress,
    )
    return PlanFinder(
        reader, session.calibration, name=session.loaded.architecture, transform=session.transform, settings=settings
    )


def search(
    options: ModelOptions,
    session: SlimmingSession[LoadedVit],
    layout: Layout,
    progress: StageProgress,
    *,
    cost: Cost | None = None,
    finder: PlanFinder | None = None,
    checkpoint: Path | None = None,
) -> FoundPlan:
    """Return the plan that the options ask for, its weights fitted to it, and fine-tuned where that is asked.

    ``finder`` is used where one is at hand; ``checkpoint`` is a folder from which an interrupted training goes on. Raises
    ``PatchslimError``.
    """
    used = finder or open_finder(options, session, progress)
    try:
        request = options.request(layout)
        if request.budget.within is None:
            found = used.find_plan(request, cost, checkpoint=checkpoint)
        else:
            from slimming.most import MostSearch

            most = MostSearch(used, session.loaded, calibration_is_labelled(options, session))
            found = most.find_plan(request, cost, checkpoint=checkpoint)
    finally:
        if finder is None:
            used.close()
    if not options.finetune_epochs:
        return found
    return _finetuned(options, session, found, layout, progress, checkpoint)


def _finetuned(
    options: ModelOptions,
    session: SlimmingSession[LoadedVit],
    found: FoundPlan,
    layout: Layout,
    progress: StageProgress,
    checkpoint: Path | None,
) -> FoundPlan:
    from slimming.fitting.finetune import finetune

    loaded = session.loaded
    original = loaded.reader.model
    model = copy.deepcopy(original) if found.model is original else found.model
    report = finetune(
        loaded.slimmed(model, found.plan, layout),
        original if options.distill else None,
        training_images(options),
        data_config=loaded.data_config,
        recipe=options.recipe,
        checkpoint=checkpoint,
        progress=progress,
    )
    return dataclasses.replace(found, model=model.eval().requires_grad_(False), finetune=report.as_dict())

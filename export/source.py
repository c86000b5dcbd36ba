"""What is exported: a model and its images, known by their facts at once, and loaded when a stage first needs them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.cache import FactStore
from patchslim import cuda
from patchslim.plan import SlimPlan
from slimming.models.loading import BUNDLED, bundled_weights
from slimming.session import class_names, evaluation_images, open_session, training_images
from validate.parity_records import Evaluation

if TYPE_CHECKING:
    from export.options import ExportOptions
    from slimming.data.source import ImageSet
    from slimming.models.loading import LoadedModel
    from slimming.session import SlimmingSession


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a loaded model; ``device`` is PyTorch's device type, ``dense_plan`` the plan that drops nothing.

    ``license`` is that of the weights, where their own record says it.
    """

    architecture: str
    arguments: dict[str, Any]
    weights: str
    weights_sha256: str
    data_config: dict[str, Any]
    classes: int
    device: str
    dense_plan: dict[str, Any]
    license: str | None = None

    @property
    def key(self) -> dict[str, object]:
        """Everything that decides the model's answers."""
        return {
            "architecture": self.architecture,
            "arguments": self.arguments,
            "weights": self.weights_sha256,
            "preprocessing": self.data_config,
        }


@dataclass(frozen=True)
class ImageFacts:
    """What is known of an ``ImageSet``; ``fraction`` is the share of an undivided data set that it is, else None."""

    address: str
    split: str
    share: str
    labels: list[str]
    images: int
    fraction: float | None

    def describe(self) -> dict[str, object]:
        """What a dry run says of it."""
        return {"data": self.address, "split": self.split, "share": self.share, "images": self.images}


@dataclass(frozen=True)
class LazyModule:
    """A PyTorch module by the digest of its weights (``state_digest``); ``load`` gives it, the same one each time."""

    weights_sha256: str
    load: Callable[[], Any]


class ExportSource:
    """The model and the images that the options name.

    Their facts are taken from ``facts`` where the same options, files and code gave them before; else everything is loaded.
    ``say`` is told what a user has to know of them, each thing once: which weights were taken, files left out.
    Raises ``PatchslimError`` as ``slimming.session.open_session`` does.
    """

    def __init__(self, options: ExportOptions, facts: FactStore, say: Callable[[str], None] = lambda note: None) -> None:
        self._options, self._facts, self._say = options, facts, say
        self._said: list[str] = []
        self._files = _files_behind(options)
        self._named = {
            "model": (options.model, options.model_arg, options.weights, options.ema, options.preprocessing()),
            "images": (
                options.data,
                options.class_map and str(options.class_map),
                options.eval_images,
                options.calibration_data,
                options.calibration_images,
            ),
            "apart": (bool(options.finetune_epochs), options.train_data),
            "seed": options.seed,
            "device": (options.device, cuda.local_target(), os.environ.get("CUDA_VISIBLE_DEVICES")),
        }
        known = self._recall("source", self._find_out)
        for note in known["notes"]:
            self._tell(note)
        self.model = ModelFacts(**known["model"])
        self.calibration = ImageFacts(**known["calibration"])
        self.evaluation = ImageFacts(**known["evaluation"])

    @cached_property
    def session(self) -> SlimmingSession[LoadedModel]:
        """The loaded model, its transform and its calibration images."""
        return open_session(self._options, self.evaluation_images, say=self._tell)

    @cached_property
    def evaluation_images(self) -> ImageSet:
        """The held-out images."""
        count = self._options.eval_images
        return evaluation_images(self._options, None if count == "all" else count, class_names(self._options, self._tell))

    @cached_property
    def calibration_fingerprint(self) -> str:
        """SHA-256 over the calibration images and their classes; see ``fingerprint_of``."""
        return str(self._recall("calibration", lambda: _fingerprint(self.session.calibration)))

    @cached_property
    def evaluation_fingerprint(self) -> str:
        """SHA-256 over the held-out images and their classes; see ``fingerprint_of``."""
        return str(self._recall("evaluation", lambda: _fingerprint(self.evaluation_images)))

    @cached_property
    def original(self) -> LazyModule:
        """The dense model with its own weights."""
        return LazyModule(self.model.weights_sha256, lambda: self.session.loaded.module)

    @cached_property
    def dense_plan(self) -> SlimPlan:
        """The plan that drops nothing."""
        return SlimPlan.model_validate_json(json.dumps(self.model.dense_plan))

    def training_key(self) -> object:
        """What decides the images of a fine-tuning: what they are, and the state of every file that they are read from."""
        options = self._options
        files = data_files(options.train_data or options.data)

        def find_out() -> dict[str, Any]:
            images = training_images(options)
            return {"described": images.describe(), "notes": list(images.notes)}

        known = self._facts.recall(
            "training",
            find_out,
            files=None if files is None or self._files is None else [*files, *self._files],
            train=(options.train_data, options.train_images),
            **self._named,
        )
        for note in known["notes"]:
            self._tell(note)
        return known["described"], None if files is None else self._facts.states(files)

    def evaluation_record(self) -> Evaluation:
        """What a parity report records of the held-out images."""
        facts = self.evaluation
        return Evaluation(
            data=facts.address,
            split=f"{facts.split} ({facts.share})",
            images=facts.images,
            fingerprint=self.evaluation_fingerprint,
        )

    def _tell(self, note: str) -> None:
        if note not in self._said:
            self._said.append(note)
            self._say(note)

    def _recall(self, kind: str, find_out: Callable[[], Any]) -> Any:
        return self._facts.recall(kind, find_out, files=self._files, **self._named)

    def _find_out(self) -> dict[str, Any]:
        from slimming.api import dense_plan

        evaluated = self.evaluation_images
        session = self.session
        loaded = session.loaded
        model = ModelFacts(
            architecture=loaded.architecture,
            arguments=loaded.arguments,
            weights=loaded.weights,
            weights_sha256=loaded.weights_sha256,
            data_config=loaded.data_config,
            classes=int(loaded.module.num_classes),
            device=str(next(loaded.module.parameters()).device.type),
            dense_plan=dense_plan(loaded.module, loaded.architecture).model_dump(mode="json"),
            license=loaded.license,
        )
        images = {"calibration": session.calibration, "evaluation": evaluated}
        return {"model": dataclasses.asdict(model), "notes": self._said} | {
            name: dataclasses.asdict(_facts_of(each)) for name, each in images.items()
        }


def _facts_of(images: ImageSet) -> ImageFacts:
    return ImageFacts(images.address, images.split, images.share, list(images.labels), len(images), images.fraction)


def _fingerprint(images: ImageSet) -> str:
    from slimming.data.source import fingerprint_of

    return fingerprint_of(images)


def _files_behind(options: ExportOptions) -> list[Path] | None:
    """Files and folders that decide what the options name; None where that cannot be seen from here."""
    if options.weights == "pretrained":  # timm's hub decides which
        return None
    weights = []
    if options.weights == "bundled":
        weights = [bundled_weights(options.model)] if options.model in BUNDLED else []
    elif options.weights != "random":
        config = Path(options.weights).with_name("config.json")  # read beside weights of save_pretrained
        weights = [Path(options.weights), *([config] if config.is_file() else [])]
    images = [data_files(address) for address in (options.data, options.calibration_data or options.data)]
    if any(files is None for files in images):
        return None
    if options.class_map is not None:
        weights.append(options.class_map)
    return [*weights, *(path for files in images for path in files or ())]


def data_files(address: str) -> list[Path] | None:
    """The files or the folder that an address of images is read from; None for data sets that others keep."""
    kind, _, rest = address.partition("/")
    if address == "digits":
        return []
    if kind.lower() == "wds":
        return [Path(rest)]
    return None if kind.lower() in ("hfds", "hfids", "tfds", "torch") else [Path(address)]

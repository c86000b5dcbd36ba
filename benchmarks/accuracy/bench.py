"""Measures the rows of the accuracy tables: the dense model, the baselines, and what ``python -m slimming.run`` makes of it."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy.rows import EVIT_FORMS, Case, TableOptions, are_apart, is_other, public
from patchslim.choices import Mode
from patchslim.errors import BudgetUnreachable, InputRejected, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from benchmarks.accuracy.baselines import Baseline
    from patchslim.progress import StageProgress
    from slimming.api import FoundPlan, PlanFinder
    from slimming.data.source import ImageSet
    from slimming.models.slim_vit import SlimViT
    from slimming.run import SlimmingOptions


def held_out(options: TableOptions) -> ImageSet:
    """The images to measure on. Where nothing else is taken from ``--data``, one without splits need not be divided."""
    from slimming.data.source import evaluation_set

    others = [options.calibration_address(), *([options.train_address()] if options.finetune_epochs else [])]
    apart = [are_apart(options.data, other) for other in others]
    images = evaluation_set(options.data, options.eval_images)
    if images.share == "all" or not all(apart):
        return images
    total = len(images.samples)
    count = min(options.eval_images or total, total)
    return dataclasses.replace(images, indices=[place * total // count for place in range(count)], share="all")


class NotMeasured(Exception):  # noqa: N818 - no error: the row says why it has no number
    """A row that this model or budget does not allow."""


class Bench:
    """A model and held-out images, preprocessed once, with the dense model's answers.

    The model is loaded as ``python -m slimming.run`` loads it. ``options`` are the given ones, with the score that ``auto``
    stands for in place of it. Raises ``PatchslimError``.
    """

    def __init__(self, options: TableOptions) -> None:
        import torch

        from patchslim.progress import Reporter
        from slimming.data.source import load_tensors
        from slimming.models.reader import reader_of
        from slimming.session import open_session
        from slimming.tensor_store import TensorStore

        torch.set_num_threads(options.threads)
        self.reporter = Reporter()
        self.images = held_out(options)
        default = options.slimming(options.default_case())
        self.session = open_session(default, self.images)
        self.model: nn.Module = self.session.loaded.module
        self.reader = reader_of(self.model, options.model)
        fixed = self.reader.head.fixed
        self.options = dataclasses.replace(options, default_score=default.resolved_score(fixed_head=fixed))
        self.batch_size = options.batch_size or (100 if self.reader.tokens <= 100 else 16)
        self.pixels = TensorStore().empty(len(self.images), *self.session.loaded.data_config["input_size"])
        self.labels = torch.empty(len(self.images), dtype=torch.long)
        done = 0
        with self.reporter.bar("held-out images") as update:
            for batch, targets in load_tensors(self.images, self.session.transform, self.batch_size):
                rows = slice(done, done + len(batch))
                self.pixels[rows], self.labels[rows] = batch, targets
                done += len(batch)
                update(done, len(self.images))
        self.digests = {digest_of(image) for image in self.pixels}
        self.found_unseen: set[str] = set()
        self.dense = self.logits(self.model, "dense")

    def described(self) -> dict[str, Any]:
        """What the results are of: rows of another model or of other images do not go with them."""
        digest = hashlib.sha256(b"".join(sorted(self.digests))).hexdigest()
        loaded, options = self.session.loaded, self.options
        return {
            "model": {
                "name": loaded.name,
                "architecture": loaded.architecture,
                "arguments": loaded.arguments,
                "weights": loaded.weights,
                "weights_sha256": loaded.weights_sha256,
                "data_config": loaded.data_config,
                "macs": self.dense_macs,
                "top1": float((self.dense.argmax(1) == self.labels).double().mean()),
            },
            "evaluation": {**self.images.describe(), "data": public(self.images.address), "fingerprint": digest},
            "calibration": {"data": public(options.calibration_address()), "images": options.calibration_images},
        }

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of the dense model."""
        from patchslim.macs import macs_of

        return macs_of([self.reader.tokens] * len(self.reader.blocks), self.reader.tokens, self.reader.geometry())

    def logits(self, module: nn.Module, title: str) -> Tensor:
        """Logits (images, classes) of the held-out images."""
        import torch

        found: list[Tensor] = []
        with self.reporter.bar(title) as update, torch.inference_mode():
            for batch in torch.split(self.pixels, self.batch_size):
                found.append(module(batch.to(next(module.parameters()).device)).float().cpu())
                update(sum(map(len, found)), len(self.pixels))
        return torch.cat(found)

    def accuracy_of(self, module: nn.Module, title: str) -> dict[str, Any]:
        """Top-1 of ``module``, and how its answers differ from the dense model's; ``correct`` is a bit for each image."""
        import numpy as np

        logits = self.dense if module is self.model else self.logits(module, title)
        answers, dense = logits.argmax(1), self.dense.argmax(1)
        right, was = answers == self.labels, dense == self.labels
        log_p, log_q = self.dense.double().log_softmax(1), logits.double().log_softmax(1)
        return {
            "top1": float(right.double().mean()),
            "agreement": float((answers == dense).double().mean()),
            "kl": round(float((log_p.exp() * (log_p - log_q)).sum(1).mean()), 6),
            "gained": int((right & ~was).sum()),
            "lost": int((was & ~right).sum()),
            "correct": base64.b64encode(np.packbits(right.numpy()).tobytes()).decode(),
        }

    def on_smaller_images(self, case: Case) -> tuple[nn.Module, dict[str, Any]]:
        """The model on smaller images, at the side whose cost is nearest to the budget, and its facts; or ``NotMeasured``."""
        from benchmarks.accuracy.other_plans import at_lower_resolution

        try:
            return at_lower_resolution(self.model, self.options.model, case.budget)
        except BudgetUnreachable as error:
            raise NotMeasured(str(error)) from error

    def baseline(self, case: Case) -> tuple[Baseline, dict[str, Any]]:
        """ToMe or EViT at the cost that the case's budget names, and what its row says of it; raises ``NotMeasured``."""
        from benchmarks.accuracy.baselines import evit_for_macs, tome_for_macs

        limit, cut = int((1 - case.budget) * self.dense_macs), bool(case.head_only)
        try:
            if case.method == "ToMe":
                tome = tome_for_macs(self.model, limit, head_only=cut)
                return tome, {"macs": tome.macs(), "counts": tome.counts, "matching_macs": tome.matching_macs()}
            evit = evit_for_macs(self.model, limit, head_only=cut, **EVIT_FORMS[case.form or ""])
            return evit, {"macs": evit.macs(), "counts": evit.counts, "keep_rate": evit.keep_rate}
        except (BudgetUnreachable, InputRejected) as error:
            raise NotMeasured(str(error)) from error

    def check_unseen(self, images: ImageSet) -> None:
        """Raise ``InputRejected`` where one of ``images`` is measured on, by its place in the data or by its pixels.

        The same images are read once.
        """
        are_apart(self.options.data, images.address)
        same = images.address == self.images.address and images.split == self.images.split
        if same and set(images.indices) & set(self.images.indices):
            raise InputRejected(f"{images.address}: holds images that are measured on")
        described = json.dumps([images.describe(), images.indices])
        if described in self.found_unseen:
            return
        for image in self.preprocessed(images):
            if digest_of(image) in self.digests:
                raise InputRejected(f"{images.address}: an image of it is among the held-out images of {self.options.data}")
        self.found_unseen.add(described)

    def preprocessed(self, images: ImageSet) -> Iterator[Tensor]:
        """``images``, one after the other, as the model takes them: (3, h, w)."""
        from slimming.data.source import load_tensors

        for batch, _ in load_tensors(images, self.session.transform, 64):
            yield from batch


def digest_of(image: Tensor) -> bytes:
    """SHA-256 over a preprocessed image."""
    return hashlib.sha256(image.numpy().tobytes()).digest()


class CalibrationDraw:
    """Plans and weights made from one draw of calibration images, by the entry points of ``python -m slimming.run``.

    All scores and budgets that need the same features of the dense model are searched on the same ones.
    """

    def __init__(self, bench: Bench, mode: Mode, seed: int) -> None:
        from slimming.session import calibration_images

        images = calibration_images(bench.options.slimming(Case("auto", fit="none", mode=mode, seed=seed)))
        bench.check_unseen(images)
        self.bench, self.mode, self.seed = bench, mode, seed
        self.session = dataclasses.replace(bench.session, calibration=images)
        self._bars: StageProgress | None = None
        self._finders: dict[bool, PlanFinder] = {}

    def finder(self, options: SlimmingOptions) -> PlanFinder:
        """The features that ``options`` ask for. Eq. 6's magnitudes need unfused attention, which rounds otherwise."""
        from slimming.session import open_finder

        needs = options.request().for_model(fixed_head=self.bench.reader.head.fixed).needs_magnitudes
        if needs not in self._finders:
            self._finders[needs] = open_finder(options, self.session, self._report)
        return self._finders[needs]

    def close(self) -> None:
        """Release the features."""
        for finder in self._finders.values():
            finder.close()
        self._finders.clear()

    def _report(self, stage: str, done: int, total: int) -> None:
        if self._bars is not None:
            self._bars(stage, done, total)

    def found(self, case: Case) -> FoundPlan:
        """The plan and the weights of a case; raises ``NotMeasured``. Checkpoints lie beside the results meanwhile."""
        from benchmarks.accuracy.other_plans import other_plan
        from slimming.session import search, training_images

        bench, options = self.bench, self.bench.options.slimming(case)
        try:
            options.check()
            options.resolved_score(fixed_head=bench.reader.head.fixed)
        except UsageError as error:
            raise NotMeasured(str(error)) from error
        if case.finetune:
            bench.check_unseen(training_images(options))
        folder = bench.options.output.with_suffix(".finetune.part")
        try:
            with bench.reporter.stages() as self._bars:
                finder = self.finder(options)
                if is_other(case.method):
                    found = other_plan(case.method, finder, options)
                else:
                    found = search(options, self.session, options.layout, self._report, finder=finder, checkpoint=folder)
        except (BudgetUnreachable, UsageError) as error:
            raise NotMeasured(str(error)) from error
        if found.fit != options.fit:
            raise NotMeasured("a model whose blocks end in norms has no closed-form fit")
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def module_of(self, found: FoundPlan) -> SlimViT:
        """The model with its weights under its plan, ready to answer."""
        from slimming.models.slim_vit import SlimViT

        return SlimViT(found.model, found.plan).to(next(self.bench.model.parameters()).device).eval()

    def slim(self, case: Case) -> tuple[SlimViT, dict[str, Any]]:
        """The slimmed model of a case, and what its row says of it; raises ``NotMeasured``."""
        found = self.found(case)
        row: dict[str, Any] = {"macs": found.plan.macs(), "counts": found.plan.counts}
        return self.module_of(found), row | ({} if found.finetune is None else {"finetuned": found.finetune})

"""Measures the rows of the accuracy tables: a model with its held-out images, the rivals, and our plans and refitted models."""

from __future__ import annotations

import base64
import copy
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator
from typing import Any

from benchmarks.accuracy.rows import EVIT_FORMS, Case, Options, are_apart, public
from patchslim.choices import Mode, ScoreName
from patchslim.errors import BudgetUnreachable, InputRejected, Unavailable


def held_out(options: Options) -> Any:
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
    """A model and held-out images, preprocessed once, with the dense model's answers."""

    def __init__(self, options: Options) -> None:
        import torch
        from timm.data import create_transform

        from patchslim.progress import Reporter
        from slimming.data.source import load_tensors
        from slimming.models.loading import load_model, parse_arguments
        from slimming.models.reader import reader_of
        from slimming.tensor_store import TensorStore

        if options.device == "cuda" and not torch.cuda.is_available():
            raise Unavailable("--device cuda: PyTorch sees no CUDA device here")
        torch.set_num_threads(options.threads)
        self.options, self.reporter = options, Reporter()
        self.images = held_out(options)
        arguments = parse_arguments(options.model_arg)
        classes = len(self.images.labels)
        self.loaded = load_model(options.model, weights=options.weights, arguments=arguments, classes=classes)
        self.model = self.loaded.module.to(options.device)
        if self.model.num_classes != classes:
            raise InputRejected(f"{options.data} has {classes} classes, the model {self.model.num_classes}")
        self.reader = reader_of(self.model, options.model)
        self.batch_size = options.batch_size or (100 if self.reader.tokens <= 100 else 16)
        self.transform = create_transform(**self.loaded.data_config)
        self.pixels = TensorStore().empty(len(self.images), *self.loaded.data_config["input_size"])
        self.labels = torch.empty(len(self.images), dtype=torch.long)
        done = 0
        with self.reporter.bar("held-out images") as update:
            for batch, targets in load_tensors(self.images, self.transform, self.batch_size):
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
        loaded, options = self.loaded, self.options
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

    def logits(self, module: Any, title: str) -> Any:
        """Logits (images, classes) of the held-out images."""
        import torch

        found = []
        with self.reporter.bar(title) as update, torch.inference_mode():
            for batch in torch.split(self.pixels, self.batch_size):
                found.append(module(batch.to(self.options.device)).float().cpu())
                update(sum(map(len, found)), len(self.pixels))
        return torch.cat(found)

    def measured(self, module: Any, title: str) -> dict[str, Any]:
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

    def rival(self, case: Case) -> tuple[Any, dict[str, Any]]:
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

    def others(self, address: str, count: int, seed: int) -> Any:
        """Images to make plans from or to train on: never held-out ones, by address here and by pixels in ``unseen``."""
        from slimming.data.source import calibration_set

        images = calibration_set(address, count, seed, apart=are_apart(self.options.data, address))
        same = images.address == self.images.address and images.split == self.images.split
        if same and set(images.indices) & set(self.images.indices):
            raise InputRejected(f"{address}: holds images that are measured on")
        return images

    def unseen(self, images: Any, batch_size: int) -> Iterator[Any]:
        """Preprocessed batches of ``images``; raises ``InputRejected`` at the first one that is measured on."""
        from slimming.data.source import load_tensors

        for batch, _ in load_tensors(images, self.transform, batch_size):
            if any(digest_of(image) in self.digests for image in batch):
                raise InputRejected(f"{images.address}: an image of it is among the held-out images of {self.options.data}")
            yield batch

    def check_unseen(self, images: Any) -> None:
        """Raise ``InputRejected`` where one of ``images`` is measured on; the same images are looked at once."""
        described = json.dumps([images.describe(), images.indices])
        if described not in self.found_unseen:
            for _ in self.unseen(images, 64):
                pass
            self.found_unseen.add(described)


def digest_of(image: Any) -> bytes:
    """SHA-256 over a preprocessed image."""
    return hashlib.sha256(image.numpy().tobytes()).digest()


class Ours:
    """Plans and refitted models of one calibration draw and mode: every score and budget looks at the same dense features."""

    def __init__(self, bench: Bench, mode: Mode, seed: int) -> None:
        from slimming.search.features import BATCH, DenseFeatures

        options = bench.options
        images = bench.others(options.calibration_address(), options.calibration_images, seed)
        self.bench, self.seed, self.draw = bench, seed, (mode, seed)
        self.plans: dict[tuple[str, float], Any] = {}
        with bench.reporter.stages() as progress:
            batches = bench.unseen(images, BATCH)
            self.features = DenseFeatures(bench.reader, batches, len(images), mode=mode, progress=progress)
        self.features.progress = lambda stage, done, total: None

    def plan(self, score: ScoreName, budget: float) -> Any:
        """The plan that ``slimming.api.find_plan`` makes of these images; raises ``NotMeasured``."""
        from slimming.api import make_plan
        from slimming.search.costs import MacsCost
        from slimming.search.profile import profile_within, uniform_within
        from slimming.search.scores import score_named
        from slimming.search.similarity import MergeSearch
        from slimming.search.top_down import TopDownSearch

        if (score, budget) not in self.plans:
            features, reader = self.features, self.features.reader
            merging = score == "similarity"
            if merging and (features.mode == "stale" or not reader.head.fixed):
                raise NotMeasured("tokens are merged in compact form, under a head that reads single tokens")
            ranking = score_named(score, self.seed)
            search = MergeSearch(features) if merging else TopDownSearch(features, ranking)
            cost = MacsCost(search.tokens, search.depth, reader.geometry(), features.mode, merged=merging)
            limit = (1 - budget) * cost.dense()
            try:
                counts = (uniform_within if score == "uniform" else profile_within)(search, cost, limit)
            except BudgetUnreachable as error:
                raise NotMeasured(str(error)) from error
            found = search.by_counts(counts)
            name, merged_into = self.bench.loaded.architecture, found.merged_into
            self.plans[score, budget] = make_plan(reader.model, name, found.kept, mode=features.mode, merged_into=merged_into)
        return self.plans[score, budget]

    def slim(self, case: Case) -> tuple[Any, dict[str, Any]]:
        """The slimmed model of a case, and what its row says of it; raises ``NotMeasured``."""
        from slimming.fitting.closed_form import can_compensate, compensate
        from slimming.models.slim_vit import SlimViT

        plan = self.plan(case.method, case.budget)  # type: ignore[arg-type]
        model = copy.deepcopy(self.bench.model)
        if case.fit == "closed-form":
            if not can_compensate(model):
                raise NotMeasured("a model whose blocks end in norms has no closed-form fit")
            compensate(model, self.features, plan)
        module = SlimViT(model, plan).eval()
        return module, {"macs": plan.macs(), "counts": plan.counts} | (self.finetuned(module) if case.finetune else {})

    def finetuned(self, module: Any) -> dict[str, Any]:
        """Fine-tune ``module`` in place, the dense original its teacher; checkpoints lie beside the results meanwhile."""
        from slimming.fitting.finetune import finetune
        from slimming.fitting.recipe import Recipe

        bench, options = self.bench, self.bench.options
        images = bench.others(options.train_address(), options.finetune_images, self.seed)
        bench.check_unseen(images)
        folder = options.output.with_suffix(".finetune.part")
        with bench.reporter.stages("steps") as progress:
            report = finetune(
                module,
                copy.deepcopy(bench.model),
                images,
                data_config=bench.loaded.data_config,
                recipe=Recipe(
                    epochs=options.finetune_epochs,
                    batch_size=options.finetune_batch_size,
                    lr=options.finetune_lr,
                    precision=options.finetune_precision,
                    seed=self.seed,
                ),
                checkpoint=folder,
                progress=progress,
            )
        shutil.rmtree(folder, ignore_errors=True)
        module.eval()
        return {"finetuned": report.as_dict()}

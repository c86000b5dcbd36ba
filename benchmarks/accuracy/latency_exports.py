"""The ONNX files whose latency is measured: the dense model, the baselines, and the model of an export's bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.accuracy import tables
from benchmarks.accuracy.bench import Bench, CalibrationDraw, NotMeasured
from benchmarks.accuracy.rows import EVIT_FORMS, Case, Row
from patchslim.records import atomic_path
from slimming.options import ModelOptions

if TYPE_CHECKING:
    from onnx import ModelProto
    from torch import nn

    from export import ExportOptions
    from slimming.api import FoundPlan

#: An exported model must answer like the PyTorch one: logits within this, on all but ``FLIPS`` of the images that are compared.
TOLERANCE, COMPARED = 1e-4, 64
#: A baseline that chooses at run time chooses otherwise where rounding decides between two all but equal tokens.
FLIPS = 0.05


class RowExporter:
    """Makes the ONNX files of each case, of a fixed ``batch``, and its row, but for the times.

    What ``folder`` has already is not made again. What ``known`` rows of the accuracy tables hold (by key, of equal counts)
    is not evaluated again.
    """

    def __init__(self, bench: Bench, folder: Path, *, batch: int, known: dict[str, Row]) -> None:
        self.bench, self.folder, self.batch, self.known = bench, folder, batch, known
        self.described = bench.described()
        self.draw: CalibrationDraw | None = None

    def row(self, case: Case) -> dict[str, Any]:
        """The case's row; ``exports`` names its ONNX files."""
        key = f"{tables.key_of(case, self.described)}-{self.batch}"
        path = self.folder / f"{key}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        row = {"method": case.method, "budget": case.budget, "fit": case.fit, "seed": case.seed, "head_only": case.head_only}
        try:
            make = self.slim if case.mode else self.dense if case.method == "dense" else self.baseline
            made = make(case, key)
        except NotMeasured as error:
            made = {"refused": f"{case.method}: {error}"}
        if "macs" in made:
            made["reduction"] = round(1 - made["macs"] / self.bench.dense_macs, 6)
            made["images"] = len(self.bench.images)
        with atomic_path(path) as part:
            part.write_text(json.dumps(row | made), encoding="utf-8")
        return row | made

    def dense(self, case: Case, key: str) -> dict[str, Any]:
        """The original; with ``head_only`` its last block is cut to the class token, which is exact."""
        from benchmarks.accuracy.baselines import ToMeViT

        module: nn.Module = self.bench.model
        macs, title = self.bench.dense_macs, "dense"
        if case.head_only:
            module = cut = ToMeViT(self.bench.model, 0, head_only=True)
            macs, title = cut.macs(), "dense, last block cut"
        row = {"macs": macs, **self.measured(module, title)} | ({"counts": cut.counts} if case.head_only else {})
        return row | {"exports": {"plain": self.export_module(module, module, f"{key}-plain")}}

    def slim(self, case: Case, key: str) -> dict[str, Any]:
        """Ours: the ONNX file of the bundle that ``export.run`` makes of the plan and its weights."""
        if self.draw is None or self.draw.seed != case.seed:
            self.draw = CalibrationDraw(self.bench, "compact", case.seed or 0)
        found = self.draw.found(case)
        module = self.draw.module_of(found)
        options = export_options(self.bench.options.slimming(case), found, self.folder / key)

        def make(path: Path) -> None:
            from export import export_bundle

            path.write_bytes((export_bundle(options).bundle / "model.onnx").read_bytes())

        path = self.export(make, module, f"{key}-plain")
        counts = found.plan.counts
        return {"macs": found.plan.macs(), "counts": counts, **self.accuracy(module, case, counts), "exports": {"plain": path}}

    def baseline(self, case: Case, key: str) -> dict[str, Any]:
        """ToMe, or EViT in the form that is best on the held-out images, as it stands and rewritten for ONNX Runtime."""
        from benchmarks.accuracy.baselines_onnx import lean

        forms = [dataclasses.replace(case, form=form) for form in (EVIT_FORMS if case.form else (None,))]
        found = []
        for form in forms:
            module, row = self.bench.baseline(form)
            found.append((module, row | self.accuracy(module, form, row["counts"]) | {"form": form.form}))
        module, row = max(found, key=lambda each: float(each[1]["top1"]))
        name = f"{key}-{row['form']}" if case.form else key
        exports = {"plain": self.export_module(module, module, f"{name}-plain")}
        exports["lean"] = self.export_module(lean(module), module, f"{name}-lean")
        return row | {"exports": exports}

    def accuracy(self, module: nn.Module, case: Case, counts: list[int]) -> dict[str, Any]:
        """Top-1 and agreement of a case: the known ones where they are of the same counts."""
        known = self.known.get(tables.key_of(case, self.described), Row())
        if "top1" not in known or known["counts"] != counts:
            return self.measured(module, case.title())
        return {"top1": known["top1"], "agreement": known["agreement"]}

    def measured(self, module: nn.Module, title: str) -> dict[str, Any]:
        """Top-1 and agreement of the PyTorch module on the held-out images."""
        measured = self.bench.accuracy_of(module, title)
        return {"top1": measured["top1"], "agreement": measured["agreement"]}

    def export_module(self, module: nn.Module, reference: nn.Module, name: str) -> dict[str, Any]:
        """Export ``module`` as it stands; see ``export``."""
        from export.onnx_export import export_dense

        size = tuple(self.bench.session.loaded.data_config["input_size"])
        return self.export(lambda path: export_dense(module.eval(), size, path), reference, name)

    def export(self, make: Callable[[Path], None], reference: nn.Module, name: str) -> dict[str, Any]:
        """Give the ONNX file that ``make`` writes a fixed batch, and compare it with the PyTorch ``reference``.

        Returns its name and the largest errors of its logits. Raises ``RuntimeError`` where it answers otherwise.
        """
        import numpy as np
        import torch

        from graph_passes.onnx_io.files import read_model, save_model
        from patchslim.ort_runner import OrtRunner
        from patchslim.runner import infer_in_batches

        path = self.folder / f"{name}.onnx"
        if (record := path.with_suffix(".json")).exists():
            found: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
            return found
        self.bench.reporter.say(f"exporting {type(reference).__name__} to {path.name}")
        # onnx-graphsurgeon logs to stdout, which is kept for the results
        with contextlib.redirect_stdout(sys.stderr), atomic_path(path) as part:
            make(part)
            model = read_model(part)
            fix_batch(model, self.batch)
            save_model(model, part)
        pixels = self.bench.pixels[:COMPARED]
        with torch.inference_mode():
            wanted = reference(pixels).numpy()
        with OrtRunner(path, threads=self.bench.options.threads) as runner:
            errors = np.abs(infer_in_batches(runner, pixels.numpy()) - wanted).max(axis=1)
        if (errors > TOLERANCE).mean() > FLIPS:
            raise RuntimeError(f"{name}: the exported {type(reference).__name__} differs from PyTorch by {np.median(errors)}")
        apart = int((errors > TOLERANCE).sum())
        made = {"file": path.name, "median_error": float(np.median(errors)), "error": float(errors.max()), "apart": apart}
        with atomic_path(record) as part:
            part.write_text(json.dumps(made), encoding="utf-8")
        return made


def export_options(slimming: ModelOptions, found: FoundPlan, folder: Path, **more: Any) -> ExportOptions:
    """Options of ``export.run`` for a plan that is found already, kept in ``folder`` with all that the export makes.

    The export measures few images and no loss of accuracy stops it, since accuracy is measured elsewhere; an answer that
    differs from the stage before does.
    """
    from export import ExportOptions
    from slimming.fitting.fitted_weights import save_fitted

    plan = folder / "plan" / "plan.json"
    plan.parent.mkdir(parents=True, exist_ok=True)
    save_fitted(found.plan, found.model, plan, found.fit, found.finetune)
    shared = {field.name: getattr(slimming, field.name) for field in dataclasses.fields(ModelOptions)}
    met = {
        option.removeprefix("--").replace("-", "_"): None for option in (*slimming.given_budgets, "merge_blocks")
    }  # by the plan
    places = {"output": folder / "bundle", "work": folder / "stages"}
    return ExportOptions(**(shared | met | {"plan": plan, "eval_images": COMPARED, "max_top1_drop": 100} | places | more))


def fix_batch(model: ModelProto, batch: int) -> None:
    """Give an exported model a fixed batch, in place, so that ONNX Runtime folds every shape in advance, whoever made it."""
    for tensor in (*model.graph.input, *model.graph.output):
        tensor.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]

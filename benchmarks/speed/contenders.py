"""Makes the models that ``benchmarks.speed.matrix`` times: what people use today, baselines at the same MACs, and ours."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.speed.contender import Contender, Kind
from patchslim.arrays import Array
from patchslim.records import atomic_path

if TYPE_CHECKING:
    from torch import nn

    from patchslim.choices import InferencePrecision
    from patchslim.plan import SlimPlan

#: What every speed is a multiple of.
PLAIN = "timm export in ONNX Runtime"
TODAY, SAME_MACS, OURS = "what people use", "at the same MACs", "ours"
#: What OpenVINO computes in, by the type in which it multiplies: with int8 all else is in bfloat16.
OPENVINO: dict[str, InferencePrecision] = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}


@dataclass(frozen=True)
class SpeedSubject:
    """A dense model, our plans of it with the weights that go with them, and images (n, channels, height, width) float32.

    ``slims`` are by the share of the MACs that they were to remove. ``calibration`` are images for the ranges of int8.
    ``labels`` (n,) are None where the weights are random.
    """

    name: str
    model: nn.Module
    slims: dict[float, tuple[SlimPlan, nn.Module]]
    images: Array
    calibration: Array
    labels: Array | None


class ContenderMaker:
    """Writes the files of contenders into ``folder``, an ONNX file for each of ``batches``.

    What is in the folder already is not made again.
    """

    def __init__(self, subject: SpeedSubject, folder: Path, *, batches: Sequence[int], threads: int) -> None:
        from benchmarks.accuracy.resolution import dense_macs

        self.subject, self.folder, self.batches, self.threads = subject, folder, batches, threads
        folder.mkdir(parents=True, exist_ok=True)
        self.dense_macs = dense_macs(subject.model, subject.name)
        self.images = self._images(subject.images, "images")

    def all(self, *, compiled: bool) -> Iterator[Contender]:
        """Every contender, ``PLAIN`` first; each is made when it is asked for."""
        model, macs = self.subject.model, self.dense_macs
        plain = self.exported("dense", model)
        yield self.onnx(PLAIN, TODAY, plain, macs)
        yield self.onnx("ONNX Runtime's transformer optimiser", TODAY, self.optimised(plain), macs)
        yield from self.torch("PyTorch", TODAY, model, macs, compiled=compiled)
        yield self.onnx("timm export in ONNX Runtime, int8", TODAY, self.quantised(plain), macs, multiplies="int8")
        yield from self.openvino("timm export in OpenVINO", TODAY, plain, macs)
        for budget in self.subject.slims:
            yield from self.lower_resolution(budget)
            yield from self.baselines(budget)
        for budget, (plan, fitted) in self.subject.slims.items():
            name = f"ours, -{budget:.0%}"
            dense = self.exported(f"slim-{budget}-dense", fitted)
            file = self.cut(f"slim-{budget}", plan, dense)
            yield from self.torch(f"{name}, in PyTorch", OURS, slim_module(plan, fitted), plan.macs(), compiled=False)
            yield self.onnx(f"{name}, in ONNX Runtime", OURS, file, plan.macs())
            yield self.onnx(f"{name}, in ONNX Runtime, int8", OURS, self.quantised(file), plan.macs(), multiplies="int8")
            yield from self.openvino(f"{name}, in OpenVINO", OURS, file, plan.macs())

    def lower_resolution(self, budget: float) -> Iterator[Contender]:
        """The dense model on smaller images, the largest that remove ``budget`` of its MACs; positions resampled by timm."""
        from benchmarks.accuracy.resolution import macs_by_side, resampled

        costs = macs_by_side(self.subject.model, self.subject.name)
        fitting = [side for side, macs in costs.items() if macs <= (1 - budget) * self.dense_macs]
        if not fitting:
            return
        side = max(fitting)
        macs, smaller = costs[side], resampled(self.subject.model, side)
        file = self.exported(f"side-{side}", smaller, (side, side))
        images = self._images(resized(self.subject.images, side), f"images-{side}")
        yield self.onnx(f"at {side} px in ONNX Runtime", SAME_MACS, file, macs, images=images)
        calibration = resized(self.subject.calibration, side)
        yield from self.openvino(f"at {side} px in OpenVINO", SAME_MACS, file, macs, images=images, calibration=calibration)

    def baselines(self, budget: float) -> Iterator[Contender]:
        """ToMe and EViT at the MACs that ``budget`` leaves, the last block cut as ours is, where the budget can be met."""
        from benchmarks.accuracy.baselines import evit_for_macs, tome_for_macs
        from benchmarks.accuracy.baselines_onnx import lean
        from patchslim.errors import BudgetUnreachable

        limit = int((1 - budget) * self.dense_macs)
        for name, make in (("ToMe", tome_for_macs), ("EViT", evit_for_macs)):
            try:
                baseline = make(self.subject.model, limit, head_only=True).eval()
            except BudgetUnreachable:
                continue
            title, macs = f"{name}, -{budget:.0%}", baseline.macs()
            yield from self.torch(f"{title}, in PyTorch", SAME_MACS, baseline, macs, compiled=False)
            file = self.exported(f"{name}-{budget}", lean(baseline).eval())
            yield self.onnx(f"{title}, in ONNX Runtime", SAME_MACS, file, macs)
            yield from self.openvino(f"{title}, in OpenVINO", SAME_MACS, file, macs, quantised=False)

    def onnx(self, name: str, group: str, file: Path, macs: int, *, images: str = "", multiplies: str = "fp32") -> Contender:
        """``file`` in ONNX Runtime."""
        return self._contender(name, group, "onnxruntime", self._fixed(file), macs, images=images, multiplies=multiplies)

    def openvino(
        self,
        name: str,
        group: str,
        file: Path,
        macs: int,
        *,
        quantised: bool = True,
        images: str = "",
        calibration: Array | None = None,
    ) -> Iterator[Contender]:
        """``file`` in OpenVINO by precision; no int8 for what chooses tokens at run time: it would take others."""
        for multiplies, precision in OPENVINO.items():
            if multiplies == "int8" and not quantised:
                continue
            read = self.quantised(file, calibration) if multiplies == "int8" else file
            more: dict[str, Any] = {"images": images, "precision": precision, "multiplies": multiplies}
            yield self._contender(f"{name}, {multiplies}", group, "openvino", self._fixed(read), macs, **more)

    def torch(self, name: str, group: str, module: nn.Module, macs: int, *, compiled: bool) -> Iterator[Contender]:
        """``module`` in PyTorch as it is, and through ``torch.compile``."""
        import torch

        path = self.folder / (name.replace(" ", "-").replace(",", "") + ".pt")
        if not path.exists():
            with atomic_path(path) as part:
                torch.save(copy.deepcopy(module).cpu().eval(), part)
        files = {batch: str(path) for batch in self.batches}
        yield self._contender(f"{name} eager", group, "torch", files, macs)
        if compiled:
            yield self._contender(f"{name}, torch.compile", group, "torch.compile", files, macs)

    def exported(self, name: str, module: nn.Module, size: tuple[int, int] | None = None) -> Path:
        """The ONNX file of ``module`` as PyTorch exports it, for images of ``size`` (height, width)."""
        from export.onnx_export import export_dense

        channels, height, width = self.subject.images.shape[1:]
        shape = (channels, *(size or (height, width)))
        return self._made(f"{name}.onnx", lambda part: export_dense(module.eval(), shape, part))

    def cut(self, name: str, plan: SlimPlan, dense: Path) -> Path:
        """What our passes make of ``dense``, cuts laid for a CPU."""
        from graph_passes import load_model, save_model, slim

        return self._made(f"{name}.onnx", lambda part: save_model(slim(load_model(dense), plan, layout="split").model, part))

    def quantised(self, file: Path, calibration: Array | None = None) -> Path:
        """``file`` as ``--precision int8`` makes it."""
        from export.quantization import quantize, read, write

        images = self.subject.calibration if calibration is None else calibration
        return self._made(f"{file.stem}-int8.onnx", lambda part: write(quantize(read(file), images), part))

    def optimised(self, file: Path) -> Path:
        """``file`` after ONNX Runtime's own offline optimiser for transformers."""
        from slimming.models.reader import reader_of

        blocks: Any = reader_of(self.subject.model, self.subject.name).geometry()
        heads = self.subject.model.blocks[0].attn.num_heads  # type: ignore[index,union-attr]

        def make(part: Path) -> None:
            from onnxruntime.transformers.optimizer import optimize_model

            made = optimize_model(str(file), model_type="vit", num_heads=int(heads), hidden_size=blocks.embed_dim)
            made.save_model_to_file(str(part))

        return self._made(f"{file.stem}-optimised.onnx", make)

    def _contender(
        self, name: str, group: str, kind: Kind, files: dict[int, str], macs: int, *, images: str = "", **more: Any
    ) -> Contender:
        return Contender(name, group, kind, files, images or self.images, self.threads, macs, **more)

    def _fixed(self, file: Path) -> dict[int, str]:
        """Copies of ``file`` for each batch, so that shapes are known in advance, whoever made it."""
        from benchmarks.accuracy.latency_exports import fix_batch
        from graph_passes.onnx_io.files import read_model, save_model

        def make(batch: int, part: Path) -> None:
            model = read_model(file)
            fix_batch(model, batch)
            save_model(model, part)

        return {
            batch: str(self._made(f"{file.stem}-x{batch}.onnx", lambda part, batch=batch: make(batch, part)))  # type: ignore[misc]
            for batch in self.batches
        }

    def _images(self, images: Array, name: str) -> str:
        return str(self._made(f"{name}.npy", lambda part: np.save(part.open("wb"), images)))

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        path = self.folder / name
        if not path.exists():
            with contextlib.redirect_stdout(sys.stderr), atomic_path(path) as part:  # libraries print; stdout is for results
                make(part)
        return path


def slim_module(plan: SlimPlan, fitted: nn.Module) -> nn.Module:
    """The slimmed model in PyTorch."""
    from slimming.models.slim_vit import SlimViT

    return SlimViT(fitted, plan).eval()


def resized(images: Array, side: int) -> Array:
    """``images`` (n, channels, h, w) at ``side`` pixels."""
    import torch

    from benchmarks.accuracy import resolution

    return np.asarray(resolution.resized(torch.from_numpy(np.ascontiguousarray(images)), side).numpy())

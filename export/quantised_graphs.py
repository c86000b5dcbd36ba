"""The quantised stages: the slim graph in 8 bits, its parts ranked by what that loses, and parts of it kept as they were."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from export.source import ExportSource
from export.stages import Workspace
from patchslim.arrays import Array
from patchslim.choices import EngineName, Precision
from patchslim.errors import Unavailable
from patchslim.ort_runner import OrtRunner
from patchslim.packages import install_command, missing
from patchslim.runner import infer_in_batches

if TYPE_CHECKING:
    import onnx

#: Calibration images that parts are ranked on.
_RANKED_ON = 64


QuantiserName = Literal["nncf", "modelopt"]
#: What quantises, as it is called and installed.
_QUANTISERS: dict[QuantiserName, str] = {"nncf": "NNCF", "modelopt": "ModelOpt"}


def quantiser_for(engine: EngineName) -> QuantiserName:
    """What quantises for an engine: where attentions must stay fused in TensorRT only ModelOpt knows which tensors it may."""
    return "modelopt" if engine == "trt" else "nncf"


def ensure_quantiser(engine: EngineName, precision: Precision) -> None:
    """Raise ``Unavailable`` where what quantises for ``engine`` is not installed."""
    if why := why_not_quantised(engine):
        raise Unavailable(f"--precision {precision}: {why}")


def why_not_quantised(engine: EngineName) -> str:
    """Why nothing can be quantised for ``engine`` here; "" where it can."""
    name = quantiser_for(engine)
    if missing([name]):
        return f"{_QUANTISERS[name]} is not installed; install it: {install_command(name)}"
    return ""


@dataclass(frozen=True)
class Quantised:
    """What is quantised, to which ``precision``: the graph ``typed``, which is ``slim`` in the type of all that stays.

    ``slim`` is in float32, ``dense`` is what it was cut from, whose tensors keep their names; ``keep`` are regular expressions
    of nodes that stay as they are.
    """

    slim: Path
    typed: Path
    dense: Path
    precision: Precision
    keep: tuple[str, ...] = ()


class QuantisedGraphs:
    """The slim graph in 8 bits, with as many of its parts kept as asked for; each is a stage of its own.

    For TensorRT the patch embedding always stays.
    """

    def __init__(self, graphs: Quantised, by: QuantiserName, source: ExportSource, work: Workspace) -> None:
        self.graphs, self.by, self._source, self._work = graphs, by, source, work
        self.slim, self.typed, self.file = graphs.slim, graphs.typed, f"model.{graphs.precision}.onnx"
        self._key = {
            "slim": work.facts.digest(graphs.slim),
            "keep": graphs.keep,
            "images": source.calibration_fingerprint,
            "by": by,
            "precision": graphs.precision,
        }

    def with_kept(self, parts: Sequence[str]) -> Path:
        """The graph whose ``parts`` are kept as they were."""
        whole = self._whole()
        if not parts:
            return whole
        folder = self._work.cache.path("mixed", parts=sorted(parts), **self._key)

        def build(part: Path) -> None:
            from export import quantization

            original = quantization.read(self._work.cache.verified(self.typed))
            known = quantization.parts_of(original, self._stream())
            names = {name for one in parts for name in known[one]}
            mixed = quantization.restore(quantization.read(self._work.cache.verified(whole)), original, names)
            quantization.write(mixed, part / self.file)

        self._work.cache.make(folder, build)
        return folder / self.file

    def ranked(self) -> list[str]:
        """The parts that are quantised, the one that loses most first."""
        whole = self._whole()
        folder = self._work.cache.path("ranked", **self._key)

        def build(part: Path) -> None:
            from export import quantization

            images = self._images(_RANKED_ON)

            def answers(model: object) -> Array:
                with OrtRunner(model.SerializeToString(), name=str(self.typed)) as runner:  # type: ignore[attr-defined]
                    return infer_in_batches(runner, images)

            original = quantization.read(self._work.cache.verified(self.typed))
            quantised = quantization.read(self._work.cache.verified(whole))
            parts = quantization.parts_of(original, self._stream())
            if self.by == "modelopt":
                del parts[quantization.EMBEDDING]
            with self._work.reporter.stages("parts") as progress:
                order = quantization.rank_parts(quantised, original, parts, answers, progress)
            (part / "order.json").write_text(json.dumps(order), encoding="utf-8")

        self._work.cache.make(folder, build)
        order: list[str] = json.loads(self._work.cache.read(folder / "order.json"))
        return order

    def _whole(self) -> Path:
        folder = self._work.cache.path("quantised", **self._key)

        def build(part: Path) -> None:
            from export import quantization

            model = quantization.read(self._work.cache.verified(self.slim))
            keep = quantization.nodes_of(model, self.graphs.keep)
            if self.by == "modelopt":
                keep |= set(quantization.parts_of(model, self._stream())[quantization.EMBEDDING])
            quantise = self._by_nncf if self.by == "nncf" else self._by_modelopt
            quantization.write(quantise(model, keep), part / self.file)

        self._work.cache.make(folder, build)
        return folder / self.file

    def _by_nncf(self, model: onnx.ModelProto, keep: set[str]) -> onnx.ModelProto:
        from export import quantization

        images = self._images(quantization.CALIBRATION_IMAGES)
        with self._work.reporter.stages() as progress:
            return quantization.quantize(model, images, keep, progress)

    def _by_modelopt(self, model: onnx.ModelProto, keep: set[str]) -> onnx.ModelProto:
        from export import modelopt, quantization

        folder = self._work.cache.path("sites", **{key: value for key, value in self._key.items() if key != "keep"})

        def build(part: Path) -> None:
            self._work.reporter.say(f"ModelOpt finds what to quantise, and the ranges of it, for {self.graphs.precision}")
            images = self._images(modelopt.CALIBRATION_IMAGES)
            sites = modelopt.find_sites(self._work.cache.verified(self.slim), images, self.graphs.precision)
            modelopt.save_sites(sites, part / "sites.json")

        self._work.cache.make(folder, build)
        sites = modelopt.load_sites(self._work.cache.read(folder / "sites.json").decode())
        chosen = [site for site in sites if site.node not in keep]
        return modelopt.quantised_at(quantization.read(self._work.cache.verified(self.typed)), chosen, self.graphs.precision)

    def _stream(self) -> list[str]:
        from export.bisect import stream_names

        return stream_names(self._work.cache.verified(self.graphs.dense))

    def _images(self, most: int) -> Array:
        """The first calibration images as the model takes them, (n, 3, h, w)."""
        from slimming.data.source import load_tensors

        session, parts, count = self._source.session, [], 0
        for batch, _ in load_tensors(session.calibration, session.transform):
            parts.append(batch.numpy())
            count += len(batch)
            if count >= most:
                break
        return np.concatenate(parts)[:most]

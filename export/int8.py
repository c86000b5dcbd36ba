"""The INT8 stages: the slim graph quantised, its parts ranked by what that loses, and parts of it kept as they were."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.source import ExportSource
from export.stages import INT8_FILE, Workspace
from patchslim.arrays import Array
from patchslim.errors import Unavailable
from patchslim.ort_runner import OrtRunner
from patchslim.packages import install_command
from patchslim.runner import infer_in_batches

#: Calibration images that parts are ranked on.
_RANKED_ON = 64


def ensure_nncf() -> None:
    """Raise ``Unavailable`` where NNCF is not installed."""
    if why := why_no_int8():
        raise Unavailable(f"--precision int8: {why}")


def why_no_int8() -> str:
    """Why nothing can be quantised here; "" where it can."""
    if importlib.util.find_spec("nncf") is None:
        return f"NNCF is not installed; install it: {install_command('nncf')}"
    return ""


class Int8Graphs:
    """The slim graph in INT8, with as many of its parts kept as asked for; each is a stage of its own.

    ``slim`` is the float32 graph, ``dense`` the one that it was cut from, whose tensors keep their names; ``keep`` are regular
    expressions of nodes that stay as they are. The patch embedding does: it is the part that loses most, and costs little.
    """

    def __init__(self, slim: Path, dense: Path, keep: Sequence[str], source: ExportSource, work: Workspace) -> None:
        self.slim, self.dense, self.keep, self._source, self._work = slim, dense, tuple(keep), source, work
        self._key = {
            "slim": work.facts.digest(slim),
            "keep": self.keep,
            "images": source.calibration_fingerprint,
        }

    def with_kept(self, parts: Sequence[str]) -> Path:
        """The graph whose ``parts`` beside the embedding are kept as they were."""
        whole = self._whole()
        if not parts:
            return whole
        folder = self._work.cache.path("mixed", parts=sorted(parts), **self._key)

        def build(part: Path) -> None:
            from export import quantization

            original = quantization.read(self._work.cache.verified(self.slim))
            known = quantization.parts_of(original, self._stream())
            names = {name for one in parts for name in known[one]}
            mixed = quantization.restore(quantization.read(self._work.cache.verified(whole)), original, names)
            quantization.write(mixed, part / INT8_FILE)

        self._work.cache.make(folder, build)
        return folder / INT8_FILE

    def ranked(self) -> list[str]:
        """The parts that are quantised, the one that loses most first."""
        whole = self._whole()
        folder = self._work.cache.path("ranked", **self._key)

        def build(part: Path) -> None:
            from export import quantization

            images = self._images(_RANKED_ON)

            def answers(model: object) -> Array:
                with OrtRunner(model.SerializeToString(), name=str(self.slim)) as runner:  # type: ignore[attr-defined]
                    return infer_in_batches(runner, images)

            original = quantization.read(self._work.cache.verified(self.slim))
            quantised = quantization.read(self._work.cache.verified(whole))
            parts = {
                title: names
                for title, names in quantization.parts_of(original, self._stream()).items()
                if title != quantization.EMBEDDING
            }
            with self._work.reporter.stages("parts") as progress:
                order = quantization.rank_parts(quantised, original, parts, answers, progress)
            (part / "order.json").write_text(json.dumps(order), encoding="utf-8")

        self._work.cache.make(folder, build)
        order: list[str] = json.loads(self._work.cache.read(folder / "order.json"))
        return order

    def _whole(self) -> Path:
        folder = self._work.cache.path("int8", **self._key)

        def build(part: Path) -> None:
            from export import quantization

            model = quantization.read(self._work.cache.verified(self.slim))
            keep = quantization.nodes_of(model, self.keep)
            keep |= set(quantization.parts_of(model, self._stream())[quantization.EMBEDDING])
            images = self._images(quantization.CALIBRATION_IMAGES)
            with self._work.reporter.stages() as progress:
                quantization.write(quantization.quantize(model, images, keep, progress), part / INT8_FILE)

        self._work.cache.make(folder, build)
        return folder / INT8_FILE

    def _stream(self) -> list[str]:
        from export.bisect import stream_names

        return stream_names(self._work.cache.verified(self.dense))

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

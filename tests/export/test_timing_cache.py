"""The times of kernels that full TensorRT measures, kept between builds.

TensorRT-RTX, which has the same classes and measures nothing, builds in its place: full TensorRT was not executed.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from export.engines.base import Backend, BuildOptions
from export.engines.onnx_info import read_onnx
from export.engines.tensorrt_build import build_files
from patchslim.blob_cache import keep_blob, kept_blob
from tests.helpers.tensorrt_vit import AHEAD_OF_TIME, fp16_recipe

_AS_TENSORRT = "import tensorrt_rtx\nglobals().update({name: getattr(tensorrt_rtx, name) for name in dir(tensorrt_rtx)})\n"

pytestmark = [*AHEAD_OF_TIME, pytest.mark.slow]


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp16_recipe(tmp_path_factory.mktemp("bundle")) / "model.fp16.onnx"


def test_times_are_kept_and_damage_to_them_is_harmless(
    onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "tensorrt.py").write_text(_AS_TENSORRT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    backend, cache = Backend("tensorrt", ("sm90",)), tmp_path / "cache"

    def built() -> bytes:
        options = BuildOptions(backend.targets, "fp16", (1, 2, 4), cache=cache)
        return build_files(onnx, tmp_path / "out", read_onnx(onnx), backend, options).files[0].read_bytes()

    first = built()
    (times,) = cache.iterdir()
    fresh = kept_blob(times)
    assert fresh
    assert not caplog.messages
    for damaged, why in ((times.read_bytes()[:-1], "it is damaged"), (None, "TensorRT does not take it here")):
        if damaged is None:
            keep_blob(times, b"whole, and no times of kernels" * 10)
        else:
            times.write_bytes(damaged)
        assert built() == first
        assert caplog.messages == [f"{times}: is not used, since {why}; it is made anew"]
        assert kept_blob(times) == fresh
        caplog.clear()
    assert list(cache.iterdir()) == [times]

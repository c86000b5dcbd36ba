"""Kernels that TensorRT-RTX compiled, kept by engine and device; its objects need a GPU: others answer in their place."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from patchslim import cuda
from patchslim.blob_cache import keep_blob, kept_blob
from patchslim.tensorrt_caches import RuntimeCache, attach_timing_cache, runtime_cache_file, timing_cache_file
from patchslim.work_folder import tensorrt_cache

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")


class Kernels:
    """In the place of an ``IRuntimeCache``: it takes what begins with ``kernels``."""

    def __init__(self) -> None:
        self.data = b"kernels"

    def deserialize(self, blob: bytes) -> bool:
        if not blob.startswith(b"kernels"):
            return False
        self.data = blob
        return True

    def serialize(self) -> bytes:
        return self.data


def engine(kernels: Kernels) -> Any:
    told: dict[str, Any] = {}
    config = SimpleNamespace(create_runtime_cache=lambda: kernels, set_runtime_cache=lambda cache: told.update(cache=cache))
    context = SimpleNamespace(told=told)
    return SimpleNamespace(create_runtime_config=lambda: config, create_execution_context=lambda given: context)


def test_what_was_compiled_is_given_to_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.kernels"
    first = Kernels()
    cache = RuntimeCache(engine(first), path)
    assert cache.context.told["cache"] is first
    first.data = b"kernels of batch 8"
    cache.keep()
    assert kept_blob(path) == b"kernels of batch 8"
    path.write_bytes(b"")
    cache.keep()
    assert path.read_bytes() == b""  # it holds what it held
    first.data = b"kernels of batch 8 and 1"
    cache.keep()
    second = Kernels()
    RuntimeCache(engine(second), path)
    assert second.data == b"kernels of batch 8 and 1"


@pytest.mark.parametrize("whole", [True, False])
def test_what_is_damaged_or_of_elsewhere_is_compiled_anew(
    whole: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.kernels"
    keep_blob(path, b"of another GPU")
    if not whole:
        path.write_bytes(path.read_bytes()[:-1])
    kernels = Kernels()
    cache = RuntimeCache(engine(kernels), path)
    why = "TensorRT-RTX does not take it here" if whole else "it is damaged"
    assert caplog.messages == [f"{path}: is not used, since {why}; it is made anew"]
    cache.keep()
    assert kept_blob(path) == b"kernels"


def test_a_file_is_of_one_engine_release_gpu_and_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {runtime_cache_file(tmp_path, plan, version) for plan in (b"a", b"b") for version in ("1.7", "1.8")}
    times = {timing_cache_file(tmp_path, "tensorrt", version) for version in ("10.9", "11.0")}
    for known, other in (("device_name", "NVIDIA L4"), ("driver_version", "13.9"), ("local_target", "sm120")):
        monkeypatch.setattr(cuda, known, lambda other=other: other)
        names.add(runtime_cache_file(tmp_path, b"a", "1.7"))
        times.add(timing_cache_file(tmp_path, "tensorrt", "11.0"))
    assert (len(names), len(times)) == (4 + 3, 2 + 3)
    assert {path.suffix for path in names | times} == {".kernels", ".timing"}


@needs_rtx
def test_a_builder_goes_on_with_an_empty_cache_where_it_does_not_take_one() -> None:
    import tensorrt_rtx as trt

    warnings: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.WARNING:
                warnings.append(message)

    builder = trt.Builder(Logger())
    for kept, taken in ((b"", True), (b"no times of kernels" * 20, False)):
        config = builder.create_builder_config()
        assert attach_timing_cache(config, kept, warnings) is taken
        assert bytes(config.get_timing_cache().serialize())


def test_what_a_builder_refuses_is_replaced() -> None:
    given: list[bytes] = []
    config = SimpleNamespace(
        create_timing_cache=lambda kept: given.append(kept) or kept or None,
        set_timing_cache=lambda cache, ignore_mismatch: cache is None and not ignore_mismatch,
    )
    assert attach_timing_cache(config, b"of another device", []) is False
    assert given == [b"of another device", b""]


@needs_rtx
def test_tensorrt_rtx_has_what_is_asked_of_it() -> None:
    import tensorrt_rtx as trt

    for owner, names in (
        (trt.ICudaEngine, ("create_runtime_config", "create_execution_context")),
        (trt.IRuntimeConfig, ("create_runtime_cache", "set_runtime_cache")),
        (trt.IRuntimeCache, ("serialize", "deserialize")),
    ):
        assert all(hasattr(owner, name) for name in names), owner


def test_there_may_be_no_folder_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATCHSLIM_WORK", str(tmp_path))
    assert tensorrt_cache() == tmp_path / "tensorrt"
    monkeypatch.delenv("PATCHSLIM_WORK")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert tensorrt_cache() is None

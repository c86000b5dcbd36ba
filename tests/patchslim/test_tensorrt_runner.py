"""What of running a TensorRT engine needs no GPU: which profile takes a batch, and what an engine's header says."""

from __future__ import annotations

import importlib
import importlib.util
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from patchslim.errors import InputRejected
from patchslim.tensorrt_runner import TrtRunner, engine_faults, filled_batch, narrowest_profile, profiles_in_words


@pytest.mark.parametrize(
    ("batch", "number"), [(1, 0), (2, 1), (4, 1), (5, 2), (8, 2), (32, 2), (33, None), (40, 3), (41, None), (0, None)]
)
def test_the_narrowest_profile_that_takes_a_batch_is_chosen(batch: int, number: int | None) -> None:
    profiles = [(1, 1), (1, 4), (1, 32), (40, 40)]
    if number is not None:
        assert narrowest_profile(profiles, batch, "model.engine") == number
        return
    takes = "1, 1 to 4, 1 to 32, 40 images: give it as many at once"
    with pytest.raises(InputRejected, match=f"model.engine: {batch} images fit none of the engine's .* profiles: {takes}"):
        narrowest_profile(profiles, batch, "model.engine")


@pytest.mark.parametrize(("batch", "filled"), [(0, 0), (1, 1), (2, 8), (7, 8), (8, 8), (32, 32), (33, 64), (64, 64), (65, 65)])
def test_a_batch_between_two_profiles_is_filled_up(batch: int, filled: int) -> None:
    """A runner takes what lies within its limits, the last few of many images too."""
    assert filled_batch([(64, 64), (1, 1), (8, 32)], batch) == filled
    assert filled_batch([], batch) == batch  # a fixed batch
    assert filled_batch([(8, 32)], 4) == 4  # which is refused


def on_no_gpu(profiles: list[tuple[int, int]]) -> tuple[TrtRunner, list[tuple[int, ...]]]:
    """A runner whose engine answers each image with its sum; others answer in the place of TensorRT. And the shapes it ran."""
    runner, ran, there = TrtRunner.__new__(TrtRunner), list[tuple[int, ...]](), dict[int, Any]()
    runner._trt = SimpleNamespace(nptype=lambda kind: kind)
    runner._engine = SimpleNamespace(get_tensor_dtype=lambda name: np.float32)
    runner._context = SimpleNamespace(
        set_optimization_profile_async=lambda number, stream: True,
        set_input_shape=lambda name, shape: ran.append(shape) or True,
        get_tensor_shape=lambda name: (ran[-1][0], 1),
        set_tensor_address=lambda name, address: True,
        execute_async_v3=lambda stream: True,
    )

    def download(array: Any, address: int) -> None:
        array[:] = there[0].sum((1, 2, 3))[:, None]

    runner._stream = SimpleNamespace(  # type: ignore[assignment]
        handle=0,
        allocate=lambda size: 0,
        upload=there.__setitem__,
        download=download,
        wait=lambda: None,
        free=lambda address: None,
        close=lambda: ran.append(()),
    )
    runner._held = []
    runner._turn, runner._kernels, runner._chosen, runner._outputs = threading.Lock(), None, 0, ["logits"]
    runner.name, runner.input_name, runner.profiles, runner.dtype = "a.engine", "images", profiles, np.dtype(np.float32)
    return runner, ran


def test_what_is_filled_up_is_not_answered() -> None:
    runner, ran = on_no_gpu([(1, 1), (8, 32)])
    images = np.random.default_rng(0).standard_normal((9, 3, 2, 2)).astype(np.float32)
    for batch in (1, 3, 9):
        np.testing.assert_allclose(runner.infer(images[:batch]), images[:batch].sum((1, 2, 3))[:, None], rtol=1e-5)
    assert ran == [(1, 3, 2, 2), (8, 3, 2, 2), (9, 3, 2, 2)]
    with pytest.raises(InputRejected, match=r"a\.engine: 33 images fit none"):
        runner.infer(np.zeros((33, 3, 2, 2)))


def test_a_closed_runner_says_so_and_may_be_closed_again() -> None:
    runner, ran = on_no_gpu([(1, 32)])
    runner.close()
    runner.close()
    assert ran == [()]  # the stream was closed once
    with pytest.raises(InputRejected, match=r"a\.engine: it is closed"):
        runner.infer(np.zeros((1, 3, 2, 2)))


def test_profiles_are_said_in_words() -> None:
    assert profiles_in_words([(1, 1), (8, 32)]) == "1, 8 to 32 images"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("plan", [b"", b"no engine" * 100])
def test_what_is_no_engine_is_named_by_its_header(plan: bytes) -> None:
    trt: Any = importlib.import_module("tensorrt_rtx")
    assert engine_faults(trt, trt.Runtime(trt.Logger(trt.Logger.ERROR)), plan) == "malformed engine"


def test_full_tensorrt_has_no_such_check() -> None:
    assert engine_faults(SimpleNamespace(), SimpleNamespace(), b"") == ""

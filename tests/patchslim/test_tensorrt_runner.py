"""What of running a TensorRT engine needs no GPU: which profile takes a batch, and what an engine's header says."""

from __future__ import annotations

import importlib
import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest

from patchslim.errors import InputRejected
from patchslim.tensorrt_runner import engine_faults, narrowest_profile, profiles_in_words


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


def test_profiles_are_said_in_words() -> None:
    assert profiles_in_words([(1, 1), (8, 32)]) == "1, 8 to 32 images"


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
@pytest.mark.parametrize("plan", [b"", b"no engine" * 100])
def test_what_is_no_engine_is_named_by_its_header(plan: bytes) -> None:
    trt: Any = importlib.import_module("tensorrt_rtx")
    assert engine_faults(trt, trt.Runtime(trt.Logger(trt.Logger.ERROR)), plan) == "malformed engine"


def test_full_tensorrt_has_no_such_check() -> None:
    assert engine_faults(SimpleNamespace(), SimpleNamespace(), b"") == ""

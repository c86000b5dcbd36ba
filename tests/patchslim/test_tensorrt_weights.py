"""Weights given to an engine, and why not; TensorRT's objects need a GPU, so that these answer in their place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from patchslim.errors import InputRejected, Unavailable
from patchslim.tensorrt_weights import give_weights, stripped_bytes


def tensorrt(*, read: bool = True, absent: tuple[str, ...] = (), taken: bool = True) -> tuple[Any, list[Any]]:
    """The classes of TensorRT that are called, and what they were called with."""
    told: list[Any] = []

    def reader(refitter: Any, logger: Any) -> Any:
        def refit(model: Any) -> bool:
            told.append(model)
            return read

        fault = SimpleNamespace(desc=lambda: "no such node")
        return SimpleNamespace(refit_from_file=refit, refit_from_bytes=refit, num_errors=1, get_error=lambda number: fault)

    def refitter(engine: Any, logger: Any) -> Any:
        return SimpleNamespace(get_missing_weights=lambda: list(absent), refit_cuda_engine=lambda: taken)

    return SimpleNamespace(Refitter=refitter, OnnxParserRefitter=reader), told


def given(trt: Any, onnx: Path | bytes, *, refittable: bool = True) -> None:
    give_weights(trt, None, SimpleNamespace(refittable=refittable), onnx, "model.engine")


def test_weights_come_of_the_file_or_its_bytes() -> None:
    trt, told = tensorrt()
    given(trt, b"onnx")
    given(trt, Path("a/model.onnx"))
    assert told == [b"onnx", "a/model.onnx"]


def test_what_an_engine_does_not_take_is_said() -> None:
    with pytest.raises(InputRejected, match=r"model\.engine: was built to keep its weights: export with --refit"):
        given(tensorrt()[0], b"", refittable=False)
    with pytest.raises(InputRejected, match="cannot be given the weights of its ONNX file: no such node"):
        given(tensorrt(read=False)[0], b"")
    with pytest.raises(InputRejected, match="lacks 4 of its weights, as 'a', 'b', 'c': it is not of the graph"):
        given(tensorrt(absent=("a", "b", "c", "d"))[0], b"")
    with pytest.raises(Unavailable, match="the GPU did not take the weights"):
        given(tensorrt(taken=False)[0], b"")


def test_an_engine_tells_what_it_lacks() -> None:
    trt = SimpleNamespace(EngineStat=SimpleNamespace(STRIPPED_WEIGHTS_SIZE=1))
    for answer, lacks in ((-1, 0), (0, 0), (11_000_000, 11_000_000)):
        assert stripped_bytes(trt, SimpleNamespace(get_engine_stat=lambda statistic, answer=answer: answer)) == lacks
    assert stripped_bytes(SimpleNamespace(), SimpleNamespace()) == 0  # before TensorRT 10.9

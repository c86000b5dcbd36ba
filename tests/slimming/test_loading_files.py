"""Weights from a file: what is read, and every way a file can be refused."""

from __future__ import annotations

import contextlib
import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from patchslim.errors import InputRejected
from slimming.models.checkpoint import read_checkpoint
from slimming.models.loading import load_model
from tests.helpers.timm_models import TINY, build

VIT = "vit_tiny_patch16_224"


def state() -> dict[str, Tensor]:
    return {key: value.clone() for key, value in build().state_dict().items()}


def load(path: Path, **more: Any) -> Any:
    return load_model(VIT, weights=str(path), arguments=TINY, **more)


def refused(path: Path, fault: str) -> str:
    with pytest.raises(InputRejected, match=fault) as raised:
        load(path)
    assert str(path) in str(raised.value)
    assert raised.value.exit_code == 3
    return str(raised.value)


@pytest.mark.parametrize("form", ["safetensors", "pickle", "wrapped", "averaged alone", "parallel", "old pickle"])
def test_every_ordinary_form_is_read(tmp_path: Path, form: str) -> None:
    tensors, path = state(), tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        save_file(tensors, path)
    else:
        content: dict[str, Any] = {
            "wrapped": {"model": tensors, "epoch": 3},
            "averaged alone": {"state_dict_ema": tensors, "epoch": 3},
            "parallel": {f"module.{key}": value for key, value in tensors.items()},
        }.get(form, tensors)
        torch.save(content, path, _use_new_zipfile_serialization=form != "old pickle")
    loaded = load(path)
    assert loaded.weights == (f"{path.name} (state_dict_ema)" if form == "averaged alone" else path.name)
    for key, value in loaded.module.state_dict().items():
        assert torch.equal(value, tensors[key])


def test_the_digest_is_of_the_values_not_of_the_file(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "a.safetensors", metadata={"note": "1"})
    torch.save(state(), tmp_path / "b.pth")
    changed = state()
    changed["head.bias"][0] += 1
    save_file(changed, tmp_path / "c.safetensors")
    first, second, third = (load(tmp_path / name).weights_sha256 for name in ("a.safetensors", "b.pth", "c.safetensors"))
    assert first == second != third


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_the_models(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({key: value.to(dtype) for key, value in state().items()}, tmp_path / "w.safetensors")
    values = load(tmp_path / "w.safetensors").module.state_dict()
    for key, value in state().items():
        assert torch.equal(values[key], value.to(dtype).float())


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.target,)  # type: ignore[return-value]


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_malicious_pickle_is_refused_and_never_run(tmp_path: Path, how: str) -> None:
    path, target = tmp_path / "w.pth", tmp_path / "owned"
    content = {"head.bias": Malicious(target)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    assert "safetensors" in refused(path, "not a plain weights pickle")
    assert not target.exists()
    torch.load(path, weights_only=False) if how == "torch" else pickle.loads(path.read_bytes())
    assert target.exists()  # it would have run


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_truncated_empty_and_missing_files(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"w.{suffix}"
    refused(path, "no such weights file; --weights takes bundled, pretrained, random or a file")
    refused(tmp_path, "no such weights file")
    path.touch()
    refused(path, "empty")
    save_file(state(), path) if suffix == "safetensors" else torch.save(state(), path)
    whole = path.read_bytes()
    for share in (0.999, 0.5, 0.01):
        path.write_bytes(whole[: int(len(whole) * share)])
        refused(path, "truncated or corrupt|not a plain weights pickle")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(min_size=1, max_size=200))
def test_any_bytes_are_refused_and_never_crash(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputRejected):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [b"\x80\x02X\xff\xff\xff\x7fabc", b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b"abc"]
)
def test_no_memory_is_taken_for_a_length_that_a_pickle_claims(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputRejected, match=r"truncated or corrupt|not a plain weights pickle"):
            read_checkpoint(tmp_path / "w.pth")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), old=st.booleans())
def test_a_flipped_pickle_is_read_or_refused_and_never_crashes(tmp_path: Path, data: st.DataObject, old: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=not old)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, 2**16)) % len(content)  # an old file's length is not always the same: it holds addresses
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with contextlib.suppress(InputRejected):
        assert all(isinstance(value, Tensor) for value in read_checkpoint(path).state.values())


def test_shapes_names_and_gaps_are_listed(tmp_path: Path) -> None:
    tensors = state()
    tensors["head.weight"] = torch.zeros(1000, 48)
    del tensors["norm.bias"]
    tensors["extra"] = torch.zeros(1)
    save_file(tensors, tmp_path / "w.safetensors")
    message = refused(tmp_path / "w.safetensors", "do not fit")
    for line in (
        "head.weight: shape (1000, 48) in the file, (7, 48) in the model",
        "norm.bias: missing",
        "extra: not in the model",
    ):
        assert line in message
    save_file({"extra": torch.zeros(1)}, tmp_path / "w.safetensors")
    assert f"and {len(state()) + 1 - 12} more" in refused(tmp_path / "w.safetensors", "do not fit")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype) -> None:
    tensors = state()
    tensors["blocks.1.mlp.fc1.weight"][3, 4] = value
    tensors["blocks.1.mlp.fc1.weight"] = tensors["blocks.1.mlp.fc1.weight"].to(dtype)
    save_file(tensors, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", r"blocks\.1\.mlp\.fc1\.weight holds NaN or Inf")


def test_values_that_overflow_the_models_type(tmp_path: Path) -> None:
    tensors = state()
    tensors["norm.bias"] = torch.full((48,), 1e300, dtype=torch.float64)
    save_file(tensors, tmp_path / "w.safetensors")
    refused(tmp_path / "w.safetensors", r"norm\.bias holds NaN or Inf")


@pytest.mark.parametrize("content", [torch.zeros(3), [torch.zeros(3)], {}, {"a": 1}, {1: torch.zeros(3)}, {"model": {}}, None])
def test_files_that_hold_no_state_dict(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "w.pth")
    refused(tmp_path / "w.pth", "holds no state dict of tensors")


def test_a_files_own_record_sets_the_preprocessing_until_overridden(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    record = {"data_config": {"mean": [0.1, 0.2, 0.3], "crop_pct": 1.0, "interpolation": "bilinear"}, "top1": 97.5}
    save_file(state(), path, metadata={"patchslim": json.dumps(record)})
    loaded = load(path)
    assert loaded.record == record
    config = loaded.data_config
    assert (config["mean"], config["crop_pct"], config["interpolation"]) == ([0.1, 0.2, 0.3], 1.0, "bilinear")
    assert (config["std"], config["input_size"]) == ([0.5, 0.5, 0.5], [3, 48, 48])
    assert load(path, preprocessing={"crop_pct": 0.8}).data_config["crop_pct"] == 0.8


@pytest.mark.parametrize("record", ["[1]", "3", "not JSON"])
def test_a_record_that_is_no_object_is_refused(tmp_path: Path, record: str) -> None:
    save_file(state(), tmp_path / "w.safetensors", metadata={"patchslim": record})
    refused(tmp_path / "w.safetensors", "record is not a JSON object|corrupt")


@pytest.mark.parametrize(
    "config", [{"mean": "x"}, {"interpolation": "zzz"}, {"std": [0, 0, 0]}, {"crop_mode": "weird"}, {"crop_pct": 9}]
)
def test_a_record_with_preprocessing_that_cannot_be_used_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "w.safetensors"
    save_file(state(), path, metadata={"patchslim": json.dumps({"data_config": config})})
    with pytest.raises(InputRejected, match=f"preprocessing cannot be used: {next(iter(config))}"):
        load_model("vit_tiny_patch16_224", weights=str(path), arguments=TINY)

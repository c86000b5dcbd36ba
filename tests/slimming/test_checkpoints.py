"""Checkpoints as people have them: what is read, which of several weights is taken, and what a refusal says to do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from patchslim.errors import InputRejected, UsageError
from slimming.models.checkpoint import HARMLESS, read_checkpoint, read_labels
from slimming.models.loading import load_model, parse_arguments
from tests.helpers import checkpoints
from tests.helpers.checkpoints import READ, REFUSED, VIT, averaged_state, plain_state
from tests.helpers.timm_models import TINY


def load(path: Path, **more: Any) -> Any:
    return load_model(VIT, weights=str(path), **{"arguments": TINY, **more})


@pytest.mark.parametrize("kind", READ, ids=lambda kind: kind.__name__)
def test_what_savers_write_is_read(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    loaded = load(kind(tmp_path))
    assert loaded.weights == READ[kind]
    for key, value in loaded.module.state_dict().items():
        wanted = plain_state()[key]
        assert torch.equal(value, wanted.half().float() if kind is checkpoints.half_precision else wanted)


@pytest.mark.parametrize(
    ("kind", "name"), [(checkpoints.timm_train, "state_dict_ema"), (checkpoints.deit_main, "model_ema")], ids=["timm", "deit"]
)
def test_averaged_weights_are_taken_where_asked(tmp_path: Path, kind: Callable[[Path], Path], name: str) -> None:
    path = kind(tmp_path)
    loaded, plain = load(path, ema=True), load(path)
    assert loaded.weights == f"{path.name} ({name})"
    assert torch.equal(loaded.module.state_dict()["head.weight"], averaged_state()["head.weight"])
    assert torch.equal(plain.module.state_dict()["head.weight"], plain_state()["head.weight"])
    assert loaded.notes == (f"{path.name}: the EMA weights are taken ({name})",)
    assert f"--ema takes the averaged ones ({name})" in plain.notes[0]


def test_ema_without_averaged_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"no EMA weights are in it \(state_dict_ema or model_ema\): leave --ema out"):
        load(checkpoints.mae_finetune(tmp_path), ema=True)
    with pytest.raises(UsageError, match="--ema takes averaged weights from a file"):
        load_model(VIT, weights="random", arguments=TINY, ema=True)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    (note,) = load(checkpoints.lightning(tmp_path)).notes
    assert "1 tensor(s) outside model. are left out (criterion.weight" in note


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_what_cannot_be_used_is_refused_with_the_next_step(tmp_path: Path, kind: Callable[[Path], Path]) -> None:
    with pytest.raises(InputRejected) as raised:
        load(kind(tmp_path))
    for part in REFUSED[kind]:
        assert part in str(raised.value)
    assert "\x1b" not in str(raised.value)
    assert raised.value.exit_code == 3


def test_the_suggested_arguments_load_the_file(tmp_path: Path) -> None:
    path = checkpoints.other_shape(tmp_path)
    with pytest.raises(InputRejected) as raised:
        load(path)
    pairs = tuple(re.findall(r"--model-arg (\S+)", str(raised.value)))
    loaded = load(path, arguments=TINY | parse_arguments(pairs))
    assert (len(loaded.module.blocks), loaded.module.embed_dim) == (3, 128)


def test_timms_own_config_gives_shape_labels_and_preprocessing(tmp_path: Path) -> None:
    path = checkpoints.timm_save_pretrained(tmp_path)
    loaded = load_model(VIT, weights=str(path))  # no --model-arg
    assert (len(loaded.module.blocks), loaded.module.embed_dim, loaded.module.num_classes) == (4, 48, 7)
    assert (loaded.data_config["mean"], loaded.data_config["interpolation"]) == ([0.1, 0.2, 0.3], "bilinear")
    assert read_labels(path) == [f"class {index}" for index in range(7)]
    again = load_model(VIT, weights=str(path / "model.safetensors"))
    assert again.weights_sha256 == loaded.weights_sha256
    with pytest.raises(InputRejected, match=f"these are weights of {VIT}, not of vit_s: pass --model {VIT}"):
        load_model("vit_s", weights=str(path))


@pytest.mark.parametrize("content", ["[]", "{", '{"architecture": 3, "model_type": 4, "id2label": 5}', "[" * 100_000])
def test_a_config_that_is_none_is_refused_or_passed_over(tmp_path: Path, content: str) -> None:
    path = checkpoints.timm_save_pretrained(tmp_path)
    (path / "config.json").write_text(content)
    if content.startswith("{") and content.endswith("}"):
        assert load(path).notes == ()
        return
    with pytest.raises(InputRejected, match=r"config\.json: not a model config"):
        load(path)


def test_another_resolutions_position_embedding_is_resampled_and_said_so(tmp_path: Path) -> None:
    loaded = load(checkpoints.other_resolution(tmp_path))
    assert loaded.module.state_dict()["pos_embed"].shape[1] == 10
    assert "position embedding of 37 tokens was resampled to 10" in loaded.notes[0]
    large = load_model(VIT, weights=str(tmp_path / "large.safetensors"), arguments=TINY | {"img_size": 96})
    assert large.notes == ()


def test_patches_of_another_size_are_another_model(tmp_path: Path) -> None:
    with pytest.raises(InputRejected, match=r"depth 4, width 48: pass --model-arg patch_size=16"):
        load(checkpoints.parallel(tmp_path), arguments=TINY | {"patch_size": 8})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_weights_with_and_without_a_prefix_are_not_guessed(tmp_path: Path, prefix: str) -> None:
    tensors = plain_state() | {f"{prefix}{key}": value * 0 for key, value in plain_state().items()}
    torch.save(tensors, tmp_path / "w.pth")
    with pytest.raises(InputRejected, match=r"with and without the prefix|do not fit"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (torch.eye(3).to_sparse(), "is no dense tensor"),
        (torch.empty(3, device="meta"), "has no values"),
        (torch.zeros(1).expand(10**12), "claims 1000000000000 values, more than the file holds"),
        (torch.zeros(3, dtype=torch.complex64), "is of type complex64"),
    ],
    ids=["sparse", "meta", "stride 0", "complex"],
)
def test_tensors_that_hold_no_plain_values_are_refused(tmp_path: Path, value: torch.Tensor, fault: str) -> None:
    torch.save(plain_state() | {"norm.bias": value}, tmp_path / "w.pth")
    with pytest.raises(InputRejected, match=fault):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "config",
    [
        {"mean": [0.5] * 4},
        {"std": [True, True, True]},
        {"mean": [10**400, 0, 0]},
        {"crop_pct": 10**400},
        {"crop_pct": True},
        {"mean": {"a": 1}},
        {"interpolation": ["bicubic"]},
    ],
    ids=str,
)
def test_preprocessing_records_that_no_float_holds(tmp_path: Path, config: dict[str, Any]) -> None:
    path = tmp_path / "w.safetensors"
    save_file(plain_state(), path, metadata={"patchslim": json.dumps({"data_config": config})})
    with pytest.raises(InputRejected, match=f"preprocessing cannot be used: {next(iter(config))}") as raised:
        load(path)
    assert len(str(raised.value)) < 500


def test_a_state_dict_within_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(InputRejected, match="holds no state dict"):
        read_checkpoint(tmp_path / "w.pth")


def test_nothing_of_the_harmless_types_is_made(tmp_path: Path) -> None:
    assert not any(name.startswith(("torch", "builtins", "os", "posix")) for name in HARMLESS)
    before = set(torch.serialization.get_safe_globals())  # a set of its own, in no order
    read_checkpoint(checkpoints.timm_train(tmp_path))
    assert set(torch.serialization.get_safe_globals()) == before


def test_weights_in_several_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputRejected, match="weights in several files: save them as one"):
        load(tmp_path)

"""Which models are taken, which are refused and by what name, where weights come from, and how images are to be prepared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from patchslim.errors import InputRejected, Unavailable, UsageError
from slimming.api import FinderSettings, dense_plan, find_plan
from slimming.data.source import calibration_set
from slimming.models.loading import BUNDLED, PRESETS, load_model, parse_arguments
from slimming.models.reader import check_supported, reader_of
from slimming.search.budget import Budget
from slimming.search.request import PlanRequest
from tests.helpers.timm_models import KINDS, TINY, build

VIT = "vit_tiny_patch16_224"
SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "max pool": (VIT, SMALL | {"global_pool": "max"}, "pooling 'max'"),
    "swin": ("swin_tiny_patch4_window7_224", {"embed_dim": 12, "depths": (1, 1), "num_heads": (1, 1)}, "attention is windowed"),
    "beit": ("beit_base_patch16_224", SMALL, "Beit cannot be slimmed: its relative-position bias"),
    "relative positions": (
        "vit_relpos_small_patch16_224",
        SMALL,
        "VisionTransformerRelPos cannot be slimmed",
    ),
    "resnet": ("resnet10t", {}, "family ResNet is not supported"),
    "differential attention": (VIT, SMALL | {"attn_layer": "diff", "num_heads": 2}, "block 0: attention DiffAttention"),
    "hybrid stem": ("vit_tiny_r_s16_p8_224", {"img_size": 64}, "patch embedding HybridEmbed"),
    "dynamic size": (VIT, SMALL | {"dynamic_img_size": True}, "dynamic_img_size"),
    "no head": (VIT, SMALL | {"num_classes": 0}, "no classifier head"),
    "one channel": (VIT, SMALL | {"in_chans": 1}, "takes 1 channels"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_families_are_refused_by_name(case: str) -> None:
    name, arguments, reason = REFUSED[case]
    model = timm.create_model(name, pretrained=False, **arguments).eval()
    for refusing in (check_supported, dense_plan, reader_of):
        with pytest.raises(InputRejected, match=reason) as raised:
            refusing(model, name)
        assert f"model {name}: " in str(raised.value)
        assert "supported families are timm's Eva, VisionTransformer" in str(raised.value)
        assert raised.value.exit_code == 3


def test_a_known_family_whose_classes_are_not_timms_own_is_refused() -> None:
    model = build()
    model.__class__ = type("Changed", (type(model),), {})
    with pytest.raises(InputRejected, match="family Changed is not supported"):
        check_supported(model, "changed")


@pytest.mark.parametrize("kind", KINDS)
def test_supported_kinds_are_taken(kind: str) -> None:
    check_supported(build(kind), kind)


@pytest.mark.parametrize("weights", ["random", "bundled", "pretrained"])
def test_an_unknown_name_is_refused_whatever_the_weights(weights: str) -> None:
    with pytest.raises(InputRejected, match=r"vit_gigantic_typo: not a preset .*vit_ti.* and not a model of timm") as raised:
        load_model("vit_gigantic_typo", weights=weights)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("vit_tii", "vit_ti"),
        ("vit_tinny_patch16_224", "vit_tiny_patch16_224"),
        ("vit_base_patch61_224.mae", "vit_base_patch16_224"),
    ],
)
def test_a_misspelt_name_gets_the_nearest(name: str, near: str) -> None:
    with pytest.raises(InputRejected, match=rf"model {name}: not a preset .*; did you mean (\w+ or )*{near}\b"):
        load_model(name, weights="random")


@pytest.mark.parametrize("argument", [{"no_such_argument": 1}, {"embed_dim": 47}, {"global_pool": "nonsense"}])
def test_arguments_that_timm_refuses(argument: dict[str, Any]) -> None:
    with pytest.raises(InputRejected, match=f"model {VIT}: timm refuses .*{next(iter(argument))}"):
        load_model(VIT, weights="random", arguments=TINY | argument)


def test_presets_are_supported_models_of_timm() -> None:
    assert set(BUNDLED) <= set(PRESETS)
    for preset in ("vit_ti", "deit_ti"):
        loaded = load_model(preset, weights="random", classes=7)
        check_supported(loaded.module, preset)
        assert (loaded.architecture, loaded.module.num_classes) == (PRESETS[preset], 7)
    assert all(timm.is_model(name) for name in PRESETS.values())


def test_random_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (load_model(VIT, weights="random", arguments=TINY, seed=seed) for seed in (3, 3, 4))
    assert first.weights_sha256 == again.weights_sha256 != other.weights_sha256
    assert not first.module.training
    assert not any(parameter.requires_grad for parameter in first.module.parameters())


def test_nothing_is_bundled_for_most_models() -> None:
    with pytest.raises(
        Unavailable, match=r"no weights are bundled for deit_s .*--weights PATH, pretrained or random"
    ) as raised:
        load_model("deit_s")
    assert raised.value.exit_code == 4


def test_pretrained_weights_offline_say_what_to_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(Unavailable, match="pretrained weights of deit_ti cannot be fetched from here") as raised:
        load_model("deit_ti", weights="pretrained")
    assert raised.value.exit_code == 4
    for part in ("--weights PATH with a safetensors file", "--weights random"):
        assert part in str(raised.value)


def test_arguments_from_the_command_line() -> None:
    pairs = ("img_size=96", "reg_tokens=4", "qk_norm=True", "img=(32, 64)", "act_layer=relu", "x=a=b")
    wanted = {"img_size": 96, "reg_tokens": 4, "qk_norm": True, "img": (32, 64), "act_layer": "relu", "x": "a=b"}
    assert parse_arguments(pairs) == wanted
    for bad in ("img_size", "=3", "a b=1"):
        with pytest.raises(UsageError, match=f"--model-arg {bad}: expected key=value"):
            parse_arguments((bad,))


def test_preprocessing_is_timms_own_until_overridden() -> None:
    plain = load_model(VIT, weights="random", arguments=TINY | {"img_size": 32}).data_config
    assert plain["input_size"] == [3, 32, 32]
    assert (plain["mean"], plain["interpolation"], plain["crop_pct"]) == ([0.5, 0.5, 0.5], "bicubic", 0.9)
    overrides = {"img_size": 64, "mean": (0.1, 0.2, 0.3), "std": (1.0, 0.9, 0.8), "crop_pct": 0.5, "interpolation": "bilinear"}
    arguments = {key: value for key, value in TINY.items() if key != "img_size"}
    changed = load_model(VIT, weights="random", arguments=arguments, preprocessing=overrides)
    assert changed.data_config["input_size"] == [3, 64, 64]
    assert changed.module.patch_embed.img_size == (64, 64)
    for key in ("mean", "std", "crop_pct", "interpolation"):
        wanted = overrides[key]
        assert changed.data_config[key] == (list(wanted) if isinstance(wanted, tuple) else wanted)
    nothing = dict.fromkeys(overrides)
    assert load_model(VIT, weights="random", arguments=TINY | {"img_size": 32}, preprocessing=nothing).data_config == plain


def test_the_input_size_is_the_models_whatever_is_asked() -> None:
    for size, wanted in (((32, 64), [3, 32, 64]), (48, [3, 48, 48])):
        loaded = load_model(VIT, weights="random", arguments=TINY | {"img_size": size}, preprocessing={"img_size": 96})
        assert loaded.data_config["input_size"] == wanted


def test_find_is_the_same_twice_and_says_where_the_plan_comes_from() -> None:
    loaded = load_model(VIT, weights="random", arguments=TINY | {"patch_size": 8})
    transform = timm.data.create_transform(**loaded.data_config, is_training=False)
    images = calibration_set("digits", 6, seed=2)
    budget = Budget("macs-reduction", 0.3)
    plans = [
        find_plan(loaded.module, images, PlanRequest(budget), name=VIT, transform=transform, settings=settings).plan
        for settings in (FinderSettings(seed=2, bound=1 << 30), FinderSettings(seed=2, bound=1))
    ]
    assert plans[0] == plans[1]
    assert 1 - plans[0].macs() / plans[0].dense_macs() >= 0.3
    origin = plans[0].origin
    assert (origin.score, origin.criterion, origin.value, origin.seed) == ("similarity", "macs-reduction", 0.3, 2)
    assert origin.calibration is not None
    assert (origin.calibration.data, origin.calibration.images) == ("digits (train, all)", 6)
    found = find_plan(loaded.module, images, PlanRequest(Budget("tolerance", 0.05)), name=VIT, transform=transform)
    assert (found.plan.origin.criterion, found.plan.origin.value, found.plan.origin.tolerance) == ("tolerance", 0.05, 0.05)
    assert found.plan.origin.calibration == origin.calibration
    assert (found.fit, found.model) == ("none", loaded.module)


@pytest.mark.parametrize("mode", ["compact", "stale"])
@pytest.mark.parametrize("asked", [0.2, 0.45])
def test_find_meets_a_budget_closely_in_a_deep_model(asked: float, mode: Any) -> None:
    loaded = load_model(VIT, weights="random", arguments=TINY | {"depth": 12, "img_size": 160})  # 101 tokens
    transform = timm.data.create_transform(**loaded.data_config, is_training=False)
    images, budget = calibration_set("digits", 8), Budget("macs-reduction", asked)
    plan = find_plan(loaded.module, images, PlanRequest(budget, mode=mode), name=VIT, transform=transform).plan
    assert asked <= 1 - plan.macs() / plan.dense_macs() <= asked + 0.005


@pytest.mark.parametrize("more", [{}, {"global_pool": "avg", "class_token": False}, {"global_pool": "avg", "reg_tokens": 3}])
@pytest.mark.parametrize("score", ["paper", "uniform"])
@pytest.mark.parametrize("snap", [1, 8])
def test_find_keeps_a_budget_whatever_the_head_the_counts_and_the_rounding(snap: int, score: Any, more: dict[str, Any]) -> None:
    model = build(patch_size=8, **more)
    transform = timm.data.create_transform((3, 48, 48))
    for asked in (0.3, 0.7):
        budget = Budget("macs-reduction", asked, snap=snap)
        request, images = PlanRequest(budget, score), calibration_set("digits", 4)
        plan = find_plan(model, images, request, name="tiny", transform=transform).plan
        assert 1 - plan.macs() / plan.dense_macs() >= asked
        assert all(count % snap == 0 or count in (1, plan.tokens) for count in plan.counts[:-1])


def test_find_keeps_the_counts_that_it_is_given() -> None:
    model = build(patch_size=8)
    transform = timm.data.create_transform((3, 48, 48))
    images = calibration_set("digits", 4)
    plan = find_plan(model, images, PlanRequest(Budget("tokens", 0.0, (30, 20, 10, 1))), name="tiny", transform=transform).plan
    assert plan.counts == [30, 20, 10, 1]
    assert (plan.origin.criterion, plan.origin.value) == ("tokens", 0.0)
    for tokens, fault in (
        ((30, 20, 10, 5), "the last block keeps what the head reads, 1"),
        ((30, 20, 1), "3 token counts for 4"),
    ):
        with pytest.raises(UsageError, match=fault):
            find_plan(model, images, PlanRequest(Budget("tokens", 0.0, tokens)), name="tiny", transform=transform)


@pytest.mark.parametrize(
    ("budget", "fault"),
    [
        (Budget("tolerance", -0.1), "a number from 0"),
        (Budget("tolerance", float("nan")), "a number from 0"),
        (Budget("macs-reduction", 1.0), "a fraction"),
        (Budget("macs-reduction", 0.5, snap=0), "--snap 0"),
        (Budget("tokens", 0.0), "one count"),
        (Budget("latency-budget-ms", 0.0), "above 0"),
    ],
)
def test_find_refuses_budgets_that_mean_nothing(budget: Budget, fault: str) -> None:
    with pytest.raises(UsageError, match=fault) as raised:
        find_plan(build(), calibration_set("digits", 2), PlanRequest(budget), name="tiny", transform=None)
    assert raised.value.exit_code == 2
    assert torch.is_inference_mode_enabled() is False


def test_find_refuses_what_does_not_go_together() -> None:
    transform = timm.data.create_transform((3, 48, 48))
    for budget, score, fault in (
        (Budget("latency-reduction", 0.3), "paper", "--latency-table"),
        (Budget("tolerance", 0.1), "uniform", "--score uniform"),
    ):
        request = PlanRequest(budget, score)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match=fault):
            find_plan(build(), calibration_set("digits", 2), request, name="tiny", transform=transform)


def test_a_model_of_any_image_size_is_fixed_at_its_own() -> None:
    small = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    loaded = load_model("vit_small_patch16_dinov3", weights="random", arguments=small, classes=10)
    assert loaded.arguments["dynamic_img_size"] is False
    assert loaded.module.patch_embed.grid_size == (4, 4)
    check_supported(loaded.module, "dinov3")

"""The rule in words that a client reads: what it says for each of timm's ways, and that it cannot say anything else."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from validate.preprocessing import Preprocessing


def spec(**changes: Any) -> Preprocessing:
    fields = {
        "input_size": (3, 224, 224),
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
    }
    return Preprocessing.model_validate(fields | changes).with_rule()


def test_the_rule_of_a_deit() -> None:
    rule = spec().rule
    assert rule is not None
    assert rule.model_dump() == {
        "colours": "RGB",
        "bits": 8,
        "exif_orientation": "ignored",
        "resize": {
            "side": "shorter",
            "height": 248,
            "width": 248,
            "rounding": "down",
            "filter": "bicubic",
            "antialias": True,
        },
        "crop": {"mode": "center", "height": 224, "width": 224, "offset_rounding": "half-even", "fill": [0, 0, 0]},
        "divide_by": 255,
        "layout": "NCHW",
        "dtype": "float32",
    }


@pytest.mark.parametrize(
    ("changes", "resize"),
    [
        ({"input_size": (3, 224, 320)}, {"side": "shorter", "height": 248, "width": 355, "rounding": "half-even"}),
        ({"crop_mode": "squash"}, {"side": "both", "height": 248, "width": 248, "rounding": None}),
        ({"crop_mode": "border"}, {"side": "longer", "height": 248, "width": 248, "rounding": "half-even"}),
        ({"interpolation": "nearest"}, {"filter": "nearest", "antialias": False}),
        ({"crop_pct": 1.0}, {"height": 224, "width": 224}),
    ],
)
def test_other_ways(changes: dict[str, Any], resize: dict[str, Any]) -> None:
    rule = spec(**changes).rule
    assert rule is not None
    assert resize.items() <= rule.resize.model_dump().items()
    assert rule.crop.fill == ([124, 116, 104] if changes.get("crop_mode") == "border" else [0, 0, 0])


def test_channels_that_no_picture_has() -> None:
    grey = spec(input_size=(1, 28, 28), mean=[0.5], std=[0.5]).rule
    assert grey is not None
    assert (grey.colours, grey.crop.fill) == ("L", [0])
    assert spec(input_size=(4, 28, 28), mean=[0.5] * 4, std=[0.5] * 4).rule is None


@pytest.mark.parametrize("mean", [-1e308, 1e308, -0.1, 2.0])
def test_a_fill_is_a_byte_whatever_the_mean(mean: float) -> None:
    rule = spec(crop_mode="border", mean=[mean] * 3).rule
    assert rule is not None
    assert rule.crop.fill == [0 if mean < 0 else 255] * 3


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("resize", "width", 256),
        ("resize", "filter", "bilinear"),
        ("resize", "side", "longer"),
        ("crop", "fill", [1, 1, 1]),
        ("crop", "offset_rounding", "down"),
        (None, "colours", "L"),
        (None, "colours", "BGR"),
        (None, "divide_by", 256),
    ],
)
def test_a_rule_that_says_something_else_than_timms_names(part: str | None, field: str, value: object) -> None:
    record = spec().model_dump()
    (record["rule"] if part is None else record["rule"][part])[field] = value
    with pytest.raises(ValidationError, match=r"rule: is not the one that|Input should be"):
        Preprocessing.model_validate(record)


def test_a_crop_larger_than_any_picture_of_it_can_be() -> None:
    with pytest.raises(ValidationError, match="more than 67108864 pixels"):
        spec(crop_pct=0.01)

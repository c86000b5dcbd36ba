"""``SlimPlan``: every rule broken once, hostile files, and the order that makes every cut a prefix."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models_factory import KINDS, build, random_masks

from slimming.api import make_plan
from slimming.door import InputRejected
from slimming.plan import SlimPlan, load_plan, plan_schema

VALID: dict[str, Any] = {
    "schema_version": 1,
    "model": "tiny",
    "tokens": 8,
    "grid": [2, 3],
    "prefix_tokens": 2,
    "pooling": "token",
    "head_tokens": [0],
    "mode": "compact",
    "kept": [[0, 1, 2, 3, 5, 7], [0, 1, 3, 7], [0]],
    "geometry": {"embed_dim": 48, "mlp_hidden_dim": 96, "patch_macs": 1000, "head_macs": 480},
    "origin": {"score": "none", "criterion": "manual", "value": 0.0},
}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(where: str, value: Any) -> dict[str, Any]:
    plan = copy.deepcopy(VALID)
    *way, last = where.split(".")
    inner: Any = plan
    for key in way:
        inner = inner[int(key) if key.isdigit() else key]
    inner[int(last) if last.isdigit() else last] = value
    return plan


def test_the_valid_plan_loads(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path / "plan.json", VALID))
    assert (plan.depth, plan.counts, plan.is_dense) == (3, [6, 4, 1], False)


@pytest.mark.parametrize(
    ("where", "value", "fault"),
    [
        ("tokens", 9, "9 is not 2 prefix tokens"),
        ("tokens", "8", "tokens"),
        ("tokens", 0, "tokens"),
        ("tokens", True, "tokens"),
        ("grid", [3, 3], "3 x 3 grid"),
        ("grid", [6], "grid"),
        ("prefix_tokens", -1, "prefix_tokens"),
        ("prefix_tokens", 3, "3 prefix tokens"),
        ("pooling", "avg", "pooling"),
        ("head_tokens", [], "head_tokens"),
        ("head_tokens", [2], "head_tokens"),
        ("head_tokens", [-1], "head_tokens"),
        ("head_tokens", [1], r"kept\[2\]: lacks a token that the head reads"),
        ("mode", "sparse", "mode"),
        ("kept", [], "kept"),
        ("kept.2", [], r"kept\[2\]: must name at least one"),
        ("kept.0", [0, 1, 2, 3, 5, 8], r"kept\[0\]: must name at least one token below 8"),
        ("kept.0", [0, 1, 3, 2, 5, 7], r"kept\[0\]: indices must be sorted"),
        ("kept.0", [0, 1, 2, 3, 3, 5, 7], r"kept\[0\]: indices must be sorted"),
        ("kept.0.5", -7, "kept.0.5"),
        ("kept.0.5", 7.0, "kept.0.5"),
        ("kept.1", [0, 1, 4], r"kept\[1\]: not nested"),
        ("kept.1", [0, 3, 7], r"kept\[1\]: lacks a prefix token"),
        ("kept.2", [0, 3], r"kept\[2\]: keeps a patch, but not every prefix token"),
        ("schema_version", 2, "schema_version"),
        ("schema_version", "1", "schema_version"),
        ("surplus", 1, "surplus"),
        ("geometry.surplus", 1, "geometry.surplus"),
        ("geometry.embed_dim", 0, "geometry.embed_dim"),
        ("geometry.patch_macs", -1, "geometry.patch_macs"),
        ("geometry", None, "geometry"),
        ("origin.criterion", "guess", "origin.criterion"),
        ("origin.value", float("nan"), "origin.value"),
        ("origin.tolerance", float("inf"), "origin.tolerance"),
        ("model", None, "model"),
    ],
)
def test_every_rule_is_held(tmp_path: Path, where: str, value: Any, fault: str) -> None:
    path = write(tmp_path / "a plan.json", changed(where, value))
    with pytest.raises(InputRejected, match=fault) as raised:
        load_plan(path)
    assert str(path) in str(raised.value)
    assert raised.value.exit_code == 3


@pytest.mark.parametrize("key", [key for key in VALID if key != "schema_version"])
def test_every_field_is_required(tmp_path: Path, key: str) -> None:
    plan = {name: value for name, value in VALID.items() if name != key}
    with pytest.raises(InputRejected, match=key):
        load_plan(write(tmp_path / "plan.json", plan))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00\xff\xfe binary", b"not JSON", b"[]", b"null", b"{}", json.dumps(VALID).encode()[:-20], b"[" * 100_000],
    ids=["empty", "binary", "text", "list", "null", "no fields", "truncated", "deep"],
)
def test_files_that_are_no_plan(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputRejected, match=r"plan\.json"):
        load_plan(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.json", tmp_path):
        with pytest.raises(InputRejected, match=path.name):
            load_plan(path)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_under_the_order_every_cut_is_a_prefix(kind: str, seed: int) -> None:
    model = MODELS.setdefault(kind, build(kind))
    masks = random_masks(model, random.Random(seed))
    plan = make_plan(model, "tiny", masks)
    order = plan.order()
    assert sorted(order) == list(range(plan.tokens))
    assert order[: plan.prefix_tokens] == list(range(plan.prefix_tokens))
    for kept in plan.kept:
        assert sorted(order[: len(kept)]) == kept


MODELS: dict[str, Any] = {}


def test_a_second_head_token_before_the_first() -> None:
    plan = SlimPlan.model_validate_json(json.dumps(changed("head_tokens", [1]) | {"kept": [[0, 1, 2, 4], [0, 1, 4], [1]]}))
    assert plan.order() == [1, 0, 4, 2, 3, 5, 6, 7]


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), mode=st.sampled_from(["compact", "stale"]))
def test_a_plan_survives_its_file(tmp_path_factory: pytest.TempPathFactory, seed: int, mode: Any) -> None:
    model = MODELS.setdefault("registers", build("registers"))
    plan = make_plan(model, "tiny", random_masks(model, random.Random(seed)), mode=mode)
    folder = tmp_path_factory.mktemp("plans")
    plan.save(folder / "sub" / "plan.json")
    assert load_plan(folder / "sub" / "plan.json") == plan
    assert [path.name for path in (folder / "sub").iterdir()] == ["plan.json"]


def test_a_failed_save_leaves_the_old_plan_and_no_part(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path / "plan.json", VALID))
    target = tmp_path / "folder.json"
    target.mkdir()
    with pytest.raises(OSError, match=r"folder\.json"):
        plan.save(target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.json", "plan.json"]


def test_the_schema_names_every_field() -> None:
    assert set(plan_schema()["properties"]) == set(VALID)  # type: ignore[arg-type]


def test_reading_a_plan_needs_no_torch() -> None:
    code = "import sys, slimming.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=False).returncode == 0

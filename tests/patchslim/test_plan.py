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

from patchslim.errors import InputRejected
from patchslim.plan import FittedWeights, SlimPlan, load_plan, plan_schema
from slimming.api import make_plan
from tests.helpers.timm_models import ALL_KINDS, build, random_masks

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
POOLED: dict[str, Any] = VALID | {"pooling": "avg", "head_tokens": [], "kept": [[0, 1, 2, 3, 5, 7], [0, 1, 3, 7], [3]]}
FITTED: dict[str, Any] = {"file": "weights.safetensors", "sha256": "0" * 64, "fit": "closed-form"}


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(where: str, value: Any, base: dict[str, Any] = VALID) -> dict[str, Any]:
    plan = copy.deepcopy(base)
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
        ("pooling", "avg", r"head_tokens: \[0\] does not go with pooling 'avg'"),
        ("pooling", "map", r"head_tokens: \[0\] does not go with pooling 'map'"),
        ("pooling", "max", "pooling"),
        ("head_tokens", [], r"head_tokens: \[\] does not go with pooling 'token'"),
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
        ("geometry.attn_dim", 0, "geometry.attn_dim"),
        ("geometry.key_dim", -16, "geometry.key_dim"),
        ("geometry.mlp_macs", 0, "geometry.mlp_macs"),
        ("geometry.gate", 1, "geometry.gate"),
        ("geometry.packed_qkv", 1, "geometry.packed_qkv"),
        ("geometry.packed_mlp_dim", -1, "geometry.packed_mlp_dim"),
        ("geometry.attention_norms", -1, "geometry.attention_norms"),
        ("geometry.pool_macs", -1, "geometry.pool_macs"),
        ("geometry.pool_tokens", None, "geometry.pool_tokens"),
        ("geometry", None, "geometry"),
        ("origin.criterion", "guess", "origin.criterion"),
        ("origin.value", float("nan"), "origin.value"),
        ("origin.tolerance", float("inf"), "origin.tolerance"),
        ("origin.snap", 0, "origin.snap"),
        ("origin.errors", [0.1, float("nan")], "origin.errors"),
        ("weights", "weights.safetensors", "weights"),
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


@pytest.mark.parametrize("kept", [[0, 1, 3, 7], [3], [7], [0, 3], [1, 3, 7], [0, 1], [1]])
@pytest.mark.parametrize("pooling", ["avg", "map"])
def test_the_last_block_of_a_pooled_plan_may_lack_prefix_tokens(tmp_path: Path, pooling: str, kept: list[int]) -> None:
    plan = load_plan(write(tmp_path / "plan.json", changed("kept.2", kept, POOLED) | {"pooling": pooling}))
    assert (plan.pooling, plan.head_tokens, plan.kept[-1]) == (pooling, [], kept)
    check_order(plan)


@pytest.mark.parametrize(
    ("where", "value", "fault"),
    [
        ("head_tokens", [0], r"head_tokens: \[0\] does not go with pooling 'avg'"),
        ("pooling", "token", r"head_tokens: \[\] does not go with pooling 'token'"),
        ("kept.2", [], r"kept\[2\]: must name at least one"),
        ("kept.2", [4], r"kept\[2\]: not nested"),
        ("kept.1", [0, 3, 7], r"kept\[1\]: lacks a prefix token; they are kept until the last block"),
        ("kept.0", [1, 2, 3, 5, 7], r"kept\[0\]: lacks a prefix token"),
    ],
)
def test_the_rules_of_pooled_plans_are_held(tmp_path: Path, where: str, value: Any, fault: str) -> None:
    with pytest.raises(InputRejected, match=fault):
        load_plan(write(tmp_path / "plan.json", changed(where, value, POOLED)))


@pytest.mark.parametrize(
    "file",
    [
        "",
        ".",
        "..",
        "../weights.safetensors",
        "/weights.safetensors",
        "sub/weights.safetensors",
        "sub\\weights.safetensors",
        "C:weights.safetensors",
        "weights.safetensors\n",
        "weights\0.safetensors",
        ".hidden",
        "-rf",
        "~",
        "w" * 201,
        7,
    ],
)
def test_fitted_weights_lie_beside_the_plan_and_nowhere_else(tmp_path: Path, file: Any) -> None:
    with pytest.raises(InputRejected, match=r"weights\.file"):
        load_plan(write(tmp_path / "plan.json", VALID | {"weights": FITTED | {"file": file}}))


@pytest.mark.parametrize(
    ("field", "value"), [("sha256", "0" * 63), ("sha256", "G" * 64), ("sha256", "A" * 64), ("fit", "ridge"), ("surplus", 1)]
)
def test_fitted_weights_must_say_which_they_are(tmp_path: Path, field: str, value: Any) -> None:
    with pytest.raises(InputRejected, match=rf"weights\.{field}"):
        load_plan(write(tmp_path / "plan.json", VALID | {"weights": FITTED | {field: value}}))


def test_fitted_weights_survive_the_file(tmp_path: Path) -> None:
    recipe = {"epochs": 3, "rate": 1e-4, "data": "digits", "top1": 59.4}
    plan = load_plan(write(tmp_path / "plan.json", VALID | {"weights": FITTED | {"finetune": recipe}}))
    assert plan.weights == FittedWeights(file="weights.safetensors", sha256="0" * 64, fit="closed-form", finetune=recipe)
    plan.save(tmp_path / "again.json")
    assert load_plan(tmp_path / "again.json") == plan


def check_order(plan: SlimPlan) -> None:
    order = plan.order()
    assert sorted(order) == list(range(plan.tokens))
    for kept in plan.kept:
        start = 0 if plan.head_tokens else len(set(range(plan.prefix_tokens)) - set(kept))
        assert sorted(order[start : start + len(kept)]) == kept
    assert sorted(order[: plan.prefix_tokens]) == list(range(plan.prefix_tokens))
    assert order[: len(plan.head_tokens)] == plan.head_tokens


@pytest.mark.parametrize("kind", ALL_KINDS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_under_the_order_every_cut_is_one_run(kind: str, seed: int) -> None:
    model = MODELS.setdefault(kind, build(kind))
    plan = make_plan(model, "tiny", random_masks(model, random.Random(seed)))
    check_order(plan)


@st.composite
def any_plan(draw: st.DrawFn) -> SlimPlan:
    """Whatever plan the rules allow, whether or not there is a model for it."""
    pooling = draw(st.sampled_from(["token", "avg", "map"]))
    prefix = draw(st.integers(1 if pooling == "token" else 0, 5))
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    head = draw(_some(range(prefix), least=1)) if pooling == "token" else []
    patches = list(range(prefix, prefix + grid[0] * grid[1]))
    kept = []
    for _ in range(draw(st.integers(0, 4))):
        patches = draw(_some(patches, least=0 if prefix else 1))
        kept.append([*range(prefix), *patches])
    last = draw(_some(patches, least=0)) if patches else []
    lead = draw(_some(range(prefix), least=0))
    if pooling == "token":
        lead = list(range(prefix)) if last else sorted({*lead, *head})
    if not lead and not last:
        last, lead = patches[:1], [] if patches else [0]
    kept.append([*lead, *last])
    content = VALID | {"tokens": prefix + grid[0] * grid[1], "grid": grid, "prefix_tokens": prefix, "pooling": pooling}
    return SlimPlan.model_validate_json(json.dumps(content | {"head_tokens": head, "kept": kept}))


def _some(values: Any, least: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(list(values)), min_size=least, unique=True).map(sorted) if len(values) else st.just([])


@settings(max_examples=150, deadline=None)
@given(plan=any_plan())
def test_under_the_order_of_any_plan_every_cut_is_one_run(plan: SlimPlan) -> None:
    check_order(plan)
    assert SlimPlan.model_validate_json(plan.model_dump_json()) == plan


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
    assert set(plan_schema()["properties"]) == {*VALID, "merged_into", "weights"}  # type: ignore[arg-type]


def test_reading_a_plan_needs_no_torch() -> None:
    code = "import sys, patchslim.plan; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0

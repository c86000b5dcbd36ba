"""The weights beside a plan: named by their digest, so that no moment spoils an earlier plan."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from patchslim.errors import InputRejected
from patchslim.plan import load_plan
from slimming.fitting.fitted_weights import load_fitted, save_fitted
from tests.helpers.bundles import plan

ROOT = Path(__file__).parents[2]


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_new_weights_take_the_place_of_those_of_the_plan_before(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    first = save_fitted(plan(), model(1), path, "closed-form")
    assert first.weights is not None
    assert names(tmp_path) == [first.weights.file, "plan.json"]
    (tmp_path / "plan-of-others.safetensors").touch()
    second = save_fitted(plan(), model(2), path, "closed-form")
    assert second.weights is not None
    assert names(tmp_path) == sorted([str(second.weights.file), "plan-of-others.safetensors", "plan.json"])
    fitted = load_fitted(load_plan(path), path, model(3))
    assert torch.equal(fitted.weight, model(2).weight)  # type: ignore[arg-type]
    save_fitted(plan(), model(2), path, "none")
    assert names(tmp_path) == ["plan-of-others.safetensors", "plan.json"]


def test_a_write_that_fails_leaves_the_plan_before_and_its_weights(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    save_fitted(plan(), model(1), path, "closed-form")
    with pytest.raises(UnicodeEncodeError):  # after the weights, before the plan
        save_fitted(plan().model_copy(update={"model": "\ud800"}), model(2), path, "closed-form")
    assert torch.equal(load_fitted(load_plan(path), path, model(3)).weight, model(1).weight)  # type: ignore[arg-type]


def test_what_a_killed_run_left_of_other_weights_goes_at_the_next(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib, torch, safetensors.torch\n"
        "from slimming.fitting.fitted_weights import save_fitted\n"
        "from tests.helpers.bundles import plan\n"
        "def killed(state, path):\n"
        "    pathlib.Path(path).with_name('.tmpEb1n75').touch()  # as safetensors does\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "safetensors.torch.save_file = killed\n"
        "save_fitted(plan(), torch.nn.Linear(3, 2), pathlib.Path(sys.argv[1]), 'closed-form')\n"
    )
    path = tmp_path / "plan.json"
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    made = save_fitted(plan(), model(1), path, "closed-form")
    assert made.weights is not None
    assert names(tmp_path) == [made.weights.file, "plan.json"]


@pytest.mark.parametrize("name", ["a plan [1].json", "plän.json", ".json", "plan.of.mine", "p" * 200 + ".json"])
def test_any_name_of_a_plan_gives_a_name_of_weights(tmp_path: Path, name: str) -> None:
    for seed in (1, 2):
        save_fitted(plan(), model(seed), tmp_path / name, "closed-form")
    assert torch.equal(load_fitted(load_plan(tmp_path / name), tmp_path / name, model(3)).weight, model(2).weight)  # type: ignore[arg-type]
    assert len(names(tmp_path)) == 2


def test_a_bundles_plan_says_where_its_weights_are(tmp_path: Path) -> None:
    made = save_fitted(plan(), model(1), tmp_path / "plan.json", "closed-form")
    assert made.weights is not None
    alone = made.model_copy(update={"weights": made.weights.model_copy(update={"file": None})})
    with pytest.raises(InputRejected, match="a bundle has them in its ONNX files alone"):
        load_fitted(alone, tmp_path / "plan.json", model(1))

"""Several processes find what one finds: sums in the order of the batches, equal plans, equal weights."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.data import create_transform

from slimming.api import FinderSettings, find_plan
from slimming.data.source import calibration_set
from slimming.distributed import SINGLE_PROCESS, ProcessGroup, batch_slices, close_process_group, open_process_group
from slimming.fitting import closed_form
from slimming.search.budget import Budget
from slimming.search.request import PlanRequest
from tests.helpers.forks import run_in_two_processes
from tests.helpers.timm_models import build

#: One batch is less than two processes, and the last of three is not whole.
MODEL: dict[str, Any] = {"patch_size": 8, "depth": 3}


def find_all(folder: Path, group: ProcessGroup) -> None:
    """Find every kind of plan and write it, and the fitted weights, under the process's rank."""
    answers = {}

    def run(label: str, images: int, budget: Budget, model: Any = None, **options: Any) -> None:
        found = find_plan(
            model or build(**MODEL),
            calibration_set("digits", images),
            PlanRequest(budget, **options),
            name="tiny",
            transform=create_transform((3, 48, 48)),
            settings=FinderSettings(process_group=group),
        )
        torch.save(found.model.state_dict(), folder / f"{label}-{group.size}-{group.rank}.pt")
        answers[label] = found.plan.model_dump(mode="json")

    for score, mode in itertools.product(("paper", "residual"), ("compact", "stale")):
        run(f"{score}-{mode}-budget", 20, Budget("macs-reduction", 0.5), score=score, mode=mode, fit="closed-form")
        run(f"{score}-{mode}-tolerance", 20, Budget("tolerance", 0.01), score=score, mode=mode)
    run("pooled", 20, Budget("tolerance", 0.05), build(**MODEL, global_pool="map"), fit="closed-form")
    run("merged", 20, Budget("macs-reduction", 0.5), score="similarity", fit="closed-form")
    budget = Budget("macs-reduction", 0.4)
    run("few-blocks", 20, budget, build(patch_size=8, depth=5), score="similarity", merge_blocks=2, fit="closed-form")
    run("auto", 20, budget, build(patch_size=8, depth=5), score="similarity", merge_blocks="auto", layout="packed")
    run("random", 20, Budget("macs-reduction", 0.5), build(depth=3), score="random")
    run("one-batch", 7, Budget("macs-reduction", 0.5), build(depth=3), fit="closed-form")
    run("sgd", 50, Budget("macs-reduction", 0.5), build(depth=3), fit="sgd")
    (folder / f"answer-{group.size}-{group.rank}.json").write_text(json.dumps(answers), encoding="utf-8")


def find_alone_and_together(folder: Path) -> None:
    """What each of two processes does, the first one alone beforehand."""
    closed_form.ROWS_PER_FEATURE = 2  # rows are left out, and must be the same ones
    if os.environ["RANK"] == "0":
        find_all(folder, SINGLE_PROCESS)
        assert not torch.distributed.is_initialized()
    group = open_process_group()
    find_all(folder, group)
    group.barrier()
    close_process_group()


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process found, and each of two."""
    folder = tmp_path_factory.mktemp("process_group")
    run_in_two_processes(find_alone_and_together, folder)
    return folder


def answer(folder: Path, size: int, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"answer-{size}-{rank}.json").read_text())
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_find_the_plans_of_one(answers: Path, rank: int) -> None:
    """To the last bit, errors and fingerprint of the calibration images included."""
    alone, shared = answer(answers, 1, 0), answer(answers, 2, rank)
    assert len(alone) == 15
    for label in alone:
        assert shared[label] == alone[label], label
        assert len(alone[label]["origin"]["calibration"]["fingerprint"]) == 64
        assert min(len(kept) for kept in alone[label]["kept"][:-1]) < alone[label]["tokens"]
    assert "KL " in alone["auto"]["origin"]["merge_blocks"]


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_refit_to_the_weights_of_one(answers: Path, rank: int) -> None:
    compared = 0
    for path in sorted(answers.glob("*-1-0.pt")):
        alone = torch.load(path)
        shared = torch.load(path.with_name(path.name.replace("-1-0.pt", f"-2-{rank}.pt")))
        assert alone.keys() == shared.keys()
        if path.name.startswith("sgd"):  # to the last bit
            assert all(torch.equal(shared[name], value) for name, value in alone.items())
            assert not all(torch.equal(value, alone[name]) for name, value in build(depth=3).state_dict().items())
        for name, value in alone.items():
            torch.testing.assert_close(shared[name], value, rtol=1e-5, atol=1e-5, msg=f"{path.name}: {name}")
        compared += 1
    assert compared == 15


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_work_is_dealt_out_whole(size: int) -> None:
    dealt = [ProcessGroup(rank, size).own_batches(7) for rank in range(size)]
    assert sorted(batch for own in dealt for batch in own) == list(range(7))
    assert all(batch % size == rank for rank, own in enumerate(dealt) for batch in own)


def test_one_process_alone_adds_in_order() -> None:
    parts = [torch.tensor(value, dtype=torch.float64) for value in (1e16, 1.0, -1e16, 1.0)]
    assert float(SINGLE_PROCESS.sum_over_batches(parts, [0, 1, 2, 3])) == ((1e16 + 1.0) - 1e16) + 1.0
    assert SINGLE_PROCESS.is_primary
    with pytest.raises(ValueError, match="no batches"):
        SINGLE_PROCESS.sum_over_batches([], [])


def test_without_torchrun_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert open_process_group() is SINGLE_PROCESS
    assert not torch.distributed.is_initialized()


def test_chunks_cover_all_images_once() -> None:
    assert [(part.start, part.stop) for part in batch_slices(20, 8)] == [(0, 8), (8, 16), (16, 20)]
    assert list(batch_slices(0, 8)) == []


def test_the_fingerprint_is_of_the_batches_in_order() -> None:
    assert SINGLE_PROCESS.digest_over_batches([b"a", b"b"], 2) != SINGLE_PROCESS.digest_over_batches([b"b", b"a"], 2)
    assert SINGLE_PROCESS.digest_over_batches([b"a", b"b"], 2) == SINGLE_PROCESS.digest_over_batches([b"a", b"b"], 2)

"""Several processes find what one finds: sums in the order of the batches, equal plans, equal weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from slimming.distributed import SINGLE_PROCESS, ProcessGroup, batch_slices, open_process_group
from tests.helpers.timm_models import build

#: What every process does, the first one alone beforehand; the images are an odd number of batches, and with one batch the
#: second process has none.
SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from tests.helpers.timm_models import build
from timm.data import create_transform
from slimming.api import find_plan
from slimming.search.budget import Budget
from slimming.data.source import calibration_set
from slimming.fitting import closed_form
from slimming.distributed import SINGLE_PROCESS, close_process_group, open_process_group

closed_form.ROWS_PER_FEATURE = 2  # rows are left out, and must be the same ones
transform = create_transform((3, 48, 48))
def run(label, model, images, budget, **options):
    images = calibration_set("digits", images)
    found = find_plan(model, images, name="tiny", transform=transform, budget=budget, process_group=process_group, **options)
    torch.save(found.model.state_dict(), Path(sys.argv[1]) / f"{label}-{process_group.size}-{process_group.rank}.pt")
    answer[label] = found.plan.model_dump(mode="json")
def run_all():
    for score in ("paper", "residual"):
        for mode in ("compact", "stale"):
            model = build(patch_size=8, depth=3)
            run(f"{score}-{mode}-budget", model, 20, Budget("macs-reduction", 0.5), score=score, mode=mode, fit="closed-form")
            run(f"{score}-{mode}-tolerance", model, 20, Budget("tolerance", 0.01), score=score, mode=mode)
    run("pooled", build(patch_size=8, depth=3, global_pool="map"), 20, Budget("tolerance", 0.05), fit="closed-form")
    run("merged", build(patch_size=8, depth=3), 20, Budget("macs-reduction", 0.5), score="similarity", fit="closed-form")
    run("random", build(depth=3), 20, Budget("macs-reduction", 0.5), score="random")
    run("one-batch", build(depth=3), 7, Budget("macs-reduction", 0.5), fit="closed-form")
    run("sgd", build(depth=3), 50, Budget("macs-reduction", 0.5), fit="sgd")
    Path(sys.argv[1], f"answer-{process_group.size}-{process_group.rank}.json").write_text(json.dumps(answer))

if os.environ["RANK"] == "0":
    process_group, answer = SINGLE_PROCESS, {}
    run_all()
    assert not torch.distributed.is_initialized()
process_group, answer = open_process_group(), {}
run_all()
process_group.barrier()
close_process_group()
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process found, and each of two."""
    folder = tmp_path_factory.mktemp("process_group")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [sys.executable, *torchrun, str(script), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def answer(folder: Path, size: int, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"answer-{size}-{rank}.json").read_text())
    return found


@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_find_the_plans_of_one(answers: Path, rank: int) -> None:
    """To the last bit, errors and fingerprint of the calibration images included."""
    alone, shared = answer(answers, 1, 0), answer(answers, 2, rank)
    assert len(alone) == 13
    for label in alone:
        assert shared[label] == alone[label], label
        assert len(alone[label]["origin"]["calibration"]["fingerprint"]) == 64
        assert min(len(kept) for kept in alone[label]["kept"][:-1]) < alone[label]["tokens"]


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
    assert compared == 13


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

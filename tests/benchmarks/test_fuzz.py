"""``python -m benchmarks.fuzz``: planted faults are found, kept and replayed; the readers have none."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from pydantic import ValidationError

from benchmarks.fuzz import guided, seeds
from benchmarks.fuzz.cases import BAD, KINDS, files_of
from benchmarks.fuzz.mutators import mutate_json
from benchmarks.fuzz.run import FuzzOptions, fuzz, run
from benchmarks.fuzz.strategies import drawn_records
from benchmarks.fuzz.targets import TARGETS, counts
from patchslim.errors import UsageError
from patchslim.plan import SlimPlan
from patchslim.progress import Reporter
from tests.helpers import planted_faults
from tests.helpers.commands import door_here

ROOT = Path(__file__).parents[2]


def planted(output: Path, seed: int = 0) -> FuzzOptions:
    return FuzzOptions(inputs=150, seed=seed, output=output, workers=2, timeout=0.5, targets=planted_faults.__name__)


@pytest.mark.slow
def test_each_planted_fault_is_counted_kept_and_replayed(tmp_path: Path) -> None:
    options = planted(tmp_path / "r.json")
    table = fuzz(options, Reporter(quiet=True))
    assert json.loads(options.output.read_text()) == table
    assert table["total"]["inputs"] == 150 == sum(table["total"][kind] for kind in KINDS)
    for target, row in zip(planted_faults.TARGETS, table["readers"], strict=True):
        drawn = [int(files_of(target, 0, index)["number"]) for index in range(row["inputs"])]
        assert row["refused"] == sum(number > 7 for number in drawn)
        for kind in BAD:
            assert row[kind] == (drawn.count(3) if kind == target.name else 0), (kind, row)
    kept = sorted(path.name.partition("-")[0] for path in (tmp_path / "r.bad").iterdir())
    assert sorted(set(kept)) == ["crash", "hang", "memory", "undocumented"]
    assert len(kept) == sum(table["total"][kind] for kind in BAD)
    first = next((tmp_path / "r.bad").glob("undocumented-*"))
    with pytest.raises(KeyError, match="three"):
        run(FuzzOptions(replay=first))
    (first / "files" / "number").write_text("4")
    assert run(FuzzOptions(replay=first)) == 0


class Stopping(Reporter):
    """Ends a run after a few answers, as Ctrl-C does."""

    @contextlib.contextmanager
    def bar(self, title: str, unit: str = "images") -> Iterator[Callable[[int, int], None]]:
        def update(done: int, total: int) -> None:
            if done > total / 4:
                raise KeyboardInterrupt

        yield update


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_it_was(tmp_path: Path) -> None:
    options = planted(tmp_path / "r.json", seed=1)
    with pytest.raises(KeyboardInterrupt):
        fuzz(options, Stopping(quiet=True))
    so_far = json.loads(options.output.read_text())["total"]
    assert options.inputs / 4 < so_far["inputs"] < options.inputs
    journal = options.output.with_suffix(".part")
    head, first, *rest = journal.read_text().splitlines()
    assert rest
    marked = json.loads(first) | {"slowest": 777.0}
    journal.write_text("\n".join([head, json.dumps(marked), *rest, '{"target": "so']))  # and a line that was cut off
    table = fuzz(options, Reporter(quiet=True))
    assert max(row["slowest_ms"] for row in table["readers"]) == 777_000
    assert table["total"]["inputs"] == options.inputs
    assert not journal.exists()
    again = fuzz(options, Reporter(quiet=True))
    assert [[row[kind] for kind in KINDS] for row in again["readers"]] == [
        [row[kind] for kind in KINDS] for row in table["readers"]
    ]


def test_an_input_is_the_same_for_the_same_seed_and_another_for_another() -> None:
    for target in TARGETS:
        assert files_of(target, 0, 5) == files_of(target, 0, 5)
        assert any(files_of(target, 0, index) != files_of(target, 1, index) for index in range(5)), target.name


def digests() -> list[str]:
    drawn = [files_of(target, 0, index) for target in TARGETS for index in range(3)]
    return [hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest() for files in drawn]


@pytest.mark.slow
def test_an_input_is_the_same_in_another_process() -> None:
    script = "from tests.benchmarks.test_fuzz import digests; print(*digests())"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == digests(), done.stderr


def test_a_record_drawn_from_its_schema_is_right_in_every_type_and_often_whole() -> None:
    valid = seeds.plan().model_dump(mode="json")
    draw = drawn_records(SlimPlan, valid)
    made = [json.loads(draw(Random(number))) for number in range(60)]
    assert len({json.dumps(record) for record in made}) > 50
    faults: Counter[str] = Counter()
    for record in made:
        try:
            SlimPlan.model_validate(record)
        except ValidationError as error:
            faults.update(fault["type"] for fault in error.errors())
        else:
            faults["none"] += 1
    assert set(faults) == {"none", "value_error"}  # the record's own rules, and nothing that a schema says
    assert min(faults.values()) > 10


def test_mutations_of_json_are_mostly_json_and_seldom_the_same() -> None:
    text = seeds.plan().model_dump_json()
    made = {mutate_json(Random(number), text) for number in range(200)}
    assert len(made) > 180
    assert sum(data.startswith(b"{") and data.endswith(b"}") for data in made) > 100


def test_every_reader_gets_its_share_and_none_is_left_out() -> None:
    for inputs in (100, 3000, 1_000_000):
        shares = counts(TARGETS, inputs)
        assert sum(shares.values()) == inputs
        assert min(shares.values()) >= 1


@pytest.mark.slow
def test_some_readers_alone_leave_the_rows_of_the_others(tmp_path: Path) -> None:
    options = planted(tmp_path / "r.json")
    fuzz(options, Reporter(quiet=True))
    before = {row["reader"]: row for row in json.loads(options.output.read_text())["readers"]}
    fuzz(dataclasses.replace(options, inputs=20, seed=2, only=("crash",)), Reporter(quiet=True))
    table = json.loads(options.output.read_text())
    after = {row["reader"]: row for row in table["readers"]}
    assert (after["crash"]["inputs"], "--only crash" in after["crash"]["command"]) == (20, True)
    assert {name: row for name, row in after.items() if name != "crash"} == {
        name: row for name, row in before.items() if name != "crash"
    }
    assert table["total"]["inputs"] == sum(row["inputs"] for row in after.values())


def test_a_reader_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--only nothing: not one of sound, undocumented"):
        fuzz(dataclasses.replace(planted(tmp_path / "r.json"), only=("nothing",)), Reporter(quiet=True))


def test_the_committed_table_is_of_a_million_inputs_to_the_readers_of_today() -> None:
    table = json.loads((ROOT / "benchmarks/fuzz/results.json").read_text())
    assert 1_000_000 <= table["total"]["inputs"] == sum(row["inputs"] for row in table["readers"])
    assert {row["reader"] for row in table["readers"]} == {target.name for target in TARGETS}
    assert [table["total"][kind] for kind in BAD] == [0, 0, 0, 0]
    assert max(row["peak_mib"] for row in table["readers"]) < table["memory_mib"]


@pytest.mark.slow
def test_no_reader_fails_on_a_few_thousand_inputs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.fuzz", "--inputs", "4000", "--seed", "3", "--output", str(tmp_path / "r.json")]
    done = door_here(command)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((tmp_path / "r.json").read_text())
    assert all(table["total"][kind] == 0 for kind in BAD)
    assert all(row["read"] + row["refused"] == row["inputs"] for row in table["readers"])


def test_readers_that_are_guided_are_readers_of_that_file() -> None:
    targets = {target.name: target for target in TARGETS}
    assert all(file in targets[name].valid() for name, file in guided.READERS.items())


@pytest.mark.slow
def test_guided_inputs_are_counted_or_what_is_missing_is_said(tmp_path: Path) -> None:
    few = ["--inputs", "300", "--only", "engine headers", "--output", str(tmp_path / "g.json")]
    done = door_here([sys.executable, "-m", "benchmarks.fuzz.guided", *few])
    if importlib.util.find_spec("atheris") is None:
        assert (done.returncode, "uv run --with atheris" in done.stderr) == (4, True)
        return
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "g.json").read_text())["readers"]
    assert row["read"] + row["refused"] == row["inputs"] == 300
    assert min(row["read"], row["refused"]) > 0

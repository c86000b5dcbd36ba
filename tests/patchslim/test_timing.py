"""The loop that times candidates in turn, its clock, the levelling of slow rounds, and the processor's name."""

from __future__ import annotations

import platform
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from patchslim.timing import fair_clock, interleaved, level_rounds, processor_name, timed


def recorded(count: int, rounds: int, warmup: int) -> tuple[list[list[int]], list[list[str]]]:
    """The orders in which ``interleaved`` calls, round by round, and what it returns."""
    calls: list[int] = []

    def run(index: int) -> str:
        calls.append(index)
        return f"{index} as call {len(calls)}"

    found = interleaved([lambda index=index: run(index) for index in range(count)], rounds, warmup=warmup)
    return [calls[start : start + count] for start in range(0, len(calls), count)], found


@pytest.mark.parametrize("warmup", [0, 1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_each_round_calls_every_run_once_and_results_keep_their_places(count: int, warmup: int) -> None:
    orders, found = recorded(count, 6, warmup)
    assert len(orders) == warmup + 6
    assert all(sorted(order) == list(range(count)) for order in orders)
    assert [[int(text.split()[0]) for text in each] for each in found] == [list(range(count))] * 6
    for number, each in enumerate(found):  # the warm-up is not among them
        before = (number + warmup) * count
        assert {int(text.split()[-1]) for text in each} == set(range(before + 1, before + count + 1))


@pytest.mark.parametrize("warmup", [0, 1, 2])
def test_no_candidate_is_always_early_or_late(warmup: int) -> None:
    orders, _ = recorded(7, 20, warmup)
    measured = orders[warmup:]
    places = np.array([[order.index(candidate) for candidate in range(7)] for order in measured])
    np.testing.assert_array_equal(places.mean(axis=0), 3.0)  # each pair of rounds is one order, forwards and backwards
    assert len({tuple(order) for order in measured}) > 10
    pairs, _ = recorded(2, 10, warmup)
    assert sum(order[0] for order in pairs[warmup:]) == 5


def test_progress_counts_the_warm_up() -> None:
    told: list[tuple[int, int]] = []
    interleaved([lambda: None], 2, warmup=1, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_cpu_time_of_one_thread_stands_still_while_it_waits() -> None:
    def wait() -> None:
        time.sleep(0.05)

    assert timed(wait, fair_clock(1))() < 0.04
    for clock in (fair_clock(2), fair_clock(None), fair_clock(0), fair_clock(1, on_cpu=False)):
        assert timed(wait, clock)() >= 0.05


def test_cpu_time_of_one_thread_leaves_out_the_others() -> None:
    def work() -> None:
        end = time.thread_time() + 0.05
        while time.thread_time() < end:
            pass

    def elsewhere() -> None:
        other = threading.Thread(target=work)
        other.start()
        other.join()

    assert timed(work, fair_clock(1))() >= 0.05
    assert timed(elsewhere, fair_clock(1))() < 0.04


def test_slow_rounds_are_levelled() -> None:
    rng = np.random.default_rng(3)
    true = rng.uniform(1, 20, 30)
    slowness = np.where(np.arange(14) % 2 == 0, 1.0, 3.0)  # a machine of two speeds: raw medians are anywhere between
    times = slowness[:, None] * true * rng.uniform(0.99, 1.01, (14, 30))
    times[rng.random(times.shape) < 0.1] *= 5  # and hiccups
    found = np.median(level_rounds(times), axis=0)
    assert np.ptp(found / true) < 0.03 * np.mean(found / true)
    assert 1 <= np.mean(found / true) <= 3
    raw = np.median(times, axis=0) / true
    assert np.ptp(raw) > 0.5
    steady = np.tile(true, (5, 1))
    assert np.allclose(level_rounds(steady), steady)


def test_the_processor_has_a_name(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: A CPU @ 2:1 GHz\nprocessor\t: 1\nmodel name\t: Another\n")
    assert processor_name(cpuinfo) == "A CPU @ 2:1 GHz"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    for source in (cpuinfo, tmp_path / "absent"):
        assert processor_name(source) in {platform.processor(), platform.machine()} - {""}
    assert processor_name().strip()

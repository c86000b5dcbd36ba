"""Tensors in memory up to a bound, past it in files."""

from __future__ import annotations

from slimming.tensor_store import TensorStore


def test_the_store_counts_what_lives() -> None:
    store = TensorStore(bound=100)
    first = store.empty(5, 4)
    second = store.empty(3, 4)
    assert (store.held, store.spilled) == (80, 48)
    second.fill_(2)
    view = first[1:]
    del first
    assert store.held == 80
    del view
    assert store.held == 0
    assert store.empty(5, 5).shape == (5, 5)
    assert (store.spilled, float(second.sum())) == (48, 24)

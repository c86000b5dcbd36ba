"""Which GPU runs which engine: the documentation's table for the portable one, its own for every other."""

from __future__ import annotations

import pytest

from patchslim.targets import PORTABLE, runs_on, target_for


@pytest.mark.parametrize(
    ("local", "served"),
    [
        *((name, True) for name in ("sm80", "sm86", "sm89", "sm120", "sm121", "sm130")),
        *((name, False) for name in ("sm75", "sm87", "sm90", "sm100", None)),
    ],
)
def test_the_portable_engine_serves_what_is_documented(local: str | None, served: bool) -> None:
    assert runs_on(PORTABLE, local) is served
    assert target_for(local, [PORTABLE]) == (PORTABLE if served else None)


def test_an_engine_of_its_own_comes_first() -> None:
    assert target_for("sm89", [PORTABLE, "sm86", "sm89"]) == "sm89"
    assert target_for("sm80", [PORTABLE, "sm86"]) == PORTABLE
    assert target_for("sm75", [PORTABLE, "sm86"]) is None
    assert target_for("sm86", ["sm89"]) is None
    assert target_for(None, ["sm89", PORTABLE]) is None

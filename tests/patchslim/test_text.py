"""Text that others wrote, as a terminal may show it."""

from __future__ import annotations

import os

import pytest

from patchslim.text import MAX_MESSAGE, printable, printable_message


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ("plain, ünïcode 漢字", "plain, ünïcode 漢字"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb\rc\td", "a\\x0ab\\x0dc\\x09d"),
        ("\x7f\x9b0m", "\\x7f\\x9b0m"),
        ("left\u202eright", "left\\u202eright"),
        (os.fsdecode(b"caf\xe9"), "caf\\xe9"),
    ],
)
def test_control_characters_are_written_out(given: str, shown: str) -> None:
    assert printable(given) == shown


@pytest.mark.parametrize("given", ["a" * 10**7, "\x00" * 10**6, "a" * (MAX_MESSAGE + 1)])
def test_both_ends_of_a_long_text_are_shown(given: str) -> None:
    shown = printable(f"begin{given}end")
    assert len(shown) <= MAX_MESSAGE
    assert shown.startswith("begin")
    assert shown.endswith("end")
    assert " [...] " in shown


def test_a_message_of_several_lines_cannot_look_like_another_message() -> None:
    assert printable_message("bad name: x\nvalidate: passed") == "bad name: x\n  validate: passed"
    assert printable_message("\n".join("a" * 300 for _ in range(1000))).count("\n") == 23

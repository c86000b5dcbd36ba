"""Text from files and strangers, made fit for a terminal."""

from __future__ import annotations

import re

#: Characters of a message: a screen of 24 lines by 80 columns.
MAX_MESSAGE = 24 * 80
#: What moves a terminal's cursor, changes its colours or reorders its text: C0, C1, DEL, line and paragraph separators, marks
#: and overrides of direction; and halves of surrogate pairs, which are bytes of a name that is no UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str, limit: int = MAX_MESSAGE) -> str:
    r"""``text`` on one line: control characters are written out as ``\x1b``, its middle left out beyond ``limit``."""
    if len(text) > 2 * limit:  # an end is cut before the rest is written out: a manifest may hold megabytes of it
        text = f"{text[:limit]}{text[-limit:]}"
    text = _UNPRINTABLE.sub(lambda found: _written_out(found[0]), text)
    if len(text) <= limit:
        return text
    head = limit * 3 // 4
    return f"{text[:head]} [...] {text[head + 7 - limit :]}"


def printable_message(text: str) -> str:
    """A message of one line or more: each is ``printable``, those after the first are indented, and all fit on a screen."""
    lines = text.split("\n")
    shown = lines if len(lines) <= 24 else [*lines[:18], "[...]", *lines[-5:]]
    return "\n  ".join(printable(line, max(80, MAX_MESSAGE // len(shown))) for line in shown)


def _written_out(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # how Python spells a byte that is no UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

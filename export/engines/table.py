"""Which engines, targets and precisions work here, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchslim.console import Console


def print_engines(found: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the rows of ``engine_support`` as dictionaries: an engine and target a line, a precision a column."""
    from rich.markup import escape
    from rich.table import Table

    precisions = list(dict.fromkeys(row["precision"] for row in found))
    engines = Table("engine", "target", *precisions, title="Engines that work here", title_justify="left")
    notes: list[str] = []
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for row in found:
        rows.setdefault((row["engine"], row["target"]), {})[row["precision"]] = _cell(row, notes)
    for (engine, target), cells in rows.items():
        engines.add_row(engine, target, *(cells.get(precision, "no") for precision in precisions))
    console.print(engines)
    for number, note in enumerate(notes, start=1):
        console.print(f"  ({number}) {escape(note)}")


def _cell(row: dict[str, Any], notes: list[str]) -> str:
    """A row's status and, where there is a reason, the number of the note that gives it; new notes are appended."""
    text = {"runs": "[green]runs[/]", "builds": "builds", "refused": "no", "missing": "[yellow]missing[/]"}[row["status"]]
    text += f", {row['backend']}" if row["status"] in ("runs", "builds") else ""
    if not row["reason"]:
        return text
    if row["reason"] not in notes:
        notes.append(row["reason"])
    return f"{text} ({notes.index(row['reason']) + 1})"

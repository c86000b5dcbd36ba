"""rich's console, for text that others wrote: what a terminal would obey in it is shown, not obeyed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from patchslim.text import printable

_LONGEST = 6  # characters that one is written out as: \u202e


class Console(RichConsole):
    """A ``rich.console.Console`` whose every text goes through ``printable``; its own colours and cursor moves stay."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """As rich does it for cells and titles, which are laid out by the width of what is shown."""
        return super().render_str(_shown(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As rich does it, control characters of texts escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(_shown(segment.text), segment.style)


def _shown(text: str) -> str:
    """``text`` of any length, its line ends kept."""
    return "\n".join(printable(line, len(line) * _LONGEST) for line in text.split("\n"))

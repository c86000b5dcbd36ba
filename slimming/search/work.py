"""How far a search is: its steps are counted as trials begin, since how many trials it takes shows only on the way."""

from __future__ import annotations

from patchslim.progress import StageProgress

#: The name that the stage has in progress reports.
STAGE = "searching"


class SearchWork:
    """Steps that were done, of those begun: a block of a trial, or a batch on which a trial answers."""

    def __init__(self, progress: StageProgress) -> None:
        self._progress = progress
        self.done = self.begun = 0

    def begin(self, steps: int) -> None:
        """Begin a trial, or a part of one, of ``steps`` steps."""
        self.begun += steps
        self._progress(STAGE, self.done, self.begun)

    def step(self) -> None:
        """One step is done."""
        self.done += 1
        self._progress(STAGE, self.done, self.begun)

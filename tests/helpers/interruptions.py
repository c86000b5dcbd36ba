"""An interrupt at each moment of a piece of code at which CPython would deliver a signal."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

_CALLS = {number for name, number in dis.opmap.items() if name.startswith("CALL") or name == "JUMP_BACKWARD"}


def interruptions(work: Callable[[], object], modules: tuple[ModuleType, ...], then: Callable[[], object]) -> int:
    """Run ``work`` again and again, each time with a ``KeyboardInterrupt`` one moment later, and ``then`` after each.

    CPython looks for signals where a function begins, after a call, and at the end of a loop; the moments are those in
    the functions of ``modules``. Returns how many there were: until one was past the end, and ``work`` went through.
    """
    files = {module.__file__ for module in modules}
    moment = 0
    while _interrupted(work, files, moment):
        moment += 1
        then()
    return moment


def _interrupted(work: Callable[[], object], files: set[str | None], moment: int) -> bool:
    passed = 0
    last: dict[FrameType, int] = {}

    def look() -> None:
        nonlocal passed
        passed += 1
        if passed == moment + 1:
            raise KeyboardInterrupt

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "call":
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
            look()
        elif event == "opcode":
            before = last.get(frame)
            last[frame] = frame.f_code.co_code[frame.f_lasti]
            if before in _CALLS:
                look()
        return trace

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    except BaseException:  # what became of the interrupt
        if passed <= moment:
            raise
        return True
    finally:
        sys.settrace(earlier)
    return False

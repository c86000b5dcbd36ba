"""What a check of a bundle found: one record per thing looked at, and the exit code that follows from all of them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from patchslim.errors import (
    EXIT_DONE,
    EXIT_PARITY,
    EXIT_REJECTED,
    EXIT_UNAVAILABLE,
    InputRejected,
    ParityFailed,
    PatchslimError,
)
from patchslim.records import StrictRecord
from validate.engine_runs import EngineRun
from validate.fields import GateRule, Status
from validate.manifest import Manifest


class Check(StrictRecord):
    """One thing looked at: ``name`` says what, ``subject`` which file, ``detail`` what was found.

    ``missing`` are the packages without which it could not be looked at here.
    """

    name: str
    subject: str
    status: Status
    detail: str = ""
    missing: list[str] = Field(default_factory=list)
    exit_code: Literal[0, 3, 4, 5] = EXIT_DONE


class BundleVerdict(StrictRecord):
    """What ``check_bundle`` found; ``manifest`` is None where it could not be read."""

    folder: str
    checks: list[Check]
    manifest: Manifest | None = None
    manifest_sha256: str | None = Field(default=None, description="of manifest.json's bytes; None where it could not be read")
    engines: list[EngineRun] = Field(default_factory=list, description="the models in each engine that they were run in here")
    max_top1_drop: float | None = Field(default=None, description="the build's gate in points; None where it could not be read")
    gate_rule: GateRule = "point"

    @property
    def exit_code(self) -> int:
        """0 when the bundle is whole and answers right; 3 broken, 4 cannot be run here, 5 answers wrongly."""
        codes = [check.exit_code for check in self.checks]
        return next((code for code in (EXIT_REJECTED, EXIT_PARITY, EXIT_UNAVAILABLE) if code in codes), EXIT_DONE)

    @property
    def passed(self) -> bool:
        """Whether every check that could be made passed."""
        return self.exit_code == EXIT_DONE

    @property
    def faults(self) -> list[str]:
        """One line for every failed check."""
        return [check.detail for check in self.checks if check.status == "failed"]

    @property
    def unchecked(self) -> list[str]:
        """What could not be looked at here, for want of a package: a line each."""
        return [f"{check.name} of {check.subject}: {check.detail}" for check in self.checks if check.missing]

    @property
    def error(self) -> PatchslimError | None:
        """``InputRejected`` or ``ParityFailed`` with every fault; None where nothing failed."""
        if self.passed:
            return None
        return (ParityFailed if self.exit_code == EXIT_PARITY else InputRejected)("; ".join(self.faults))

    def raise_if_failed(self) -> None:
        """Raise ``InputRejected`` or ``ParityFailed`` with every fault, or do nothing."""
        if (error := self.error) is not None:
            raise error


def not_checked(name: str, subject: str, missing: list[str]) -> Check:
    """A check that the packages ``missing`` would be needed for."""
    detail = f"not checked: {' and '.join(missing)} {'are' if len(missing) > 1 else 'is'} not installed"
    return Check(name=name, subject=subject, status="not executed", detail=detail, missing=missing)


def failed(name: str, subject: str, fault: PatchslimError | str, code: Literal[3, 4, 5] = EXIT_REJECTED) -> Check:
    """A check that failed; ``fault`` says what was found."""
    return Check(name=name, subject=subject, status="failed", detail=str(fault), exit_code=code)

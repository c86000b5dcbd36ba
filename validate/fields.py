"""The types of fields that a bundle's records share, each with the bounds that are checked where a record is read."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

#: ``undecided``: the gate asks for confidence, and so few images can tell neither way.
Status = Literal["passed", "failed", "undecided", "not executed"]
GateRule = Literal["point", "confidence"]

Count = Annotated[int, Field(ge=0, le=(1 << 63) - 1)]
#: No set of images is larger, and the binomial distribution is known so far (validate.comparison.mcnemar).
Images = Annotated[int, Field(ge=0, le=(1 << 31) - 1)]
Size = Annotated[int, Field(ge=1, le=1 << 24)]
Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Points = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
Error = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
StageName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
Text = Annotated[str, Field(max_length=4096)]
Name = Annotated[str, Field(min_length=1, max_length=1024)]


def plain_path(text: str) -> str:
    """Return ``text`` if it is a plain relative POSIX path that stays inside the bundle; raises ``ValueError``."""
    if not text or len(text) > 512 or re.search(r"[\\:\x00-\x1f\x7f]", text):
        raise ValueError(f"{text[:80]!r} is not a plain relative path")
    if any(part in ("", ".", "..") for part in text.split("/")):
        raise ValueError(f"{text[:80]!r} is not a plain relative path: it must stay inside the bundle")
    return text


PlainPath = Annotated[str, AfterValidator(plain_path)]

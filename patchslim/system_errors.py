"""What the operating system refuses, in words: a full disk and the like, whichever library met it."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from patchslim.errors import PatchslimError, Unavailable, UsageError

#: What a place to write to lacks, and what to do about it.
_PLACES = {
    errno.ENOSPC: ("no space is left there", "free some, or name another place"),
    errno.EDQUOT: ("the disk quota is used up", "free some space, or name another place"),
    errno.EFBIG: ("files may not be that large there", "raise the limit (ulimit -f), or name another place"),
    errno.EROFS: ("it cannot be written to", "name another place"),
    errno.ENAMETOOLONG: ("the name is too long", "give a shorter one"),
    errno.EILSEQ: ("the name is not spelt as the file system wants it", "give one of plain letters"),
}
_NAMES = (errno.ENAMETOOLONG, errno.EILSEQ)
#: What libraries make of a full disk that do not raise ``OSError``: Rust's text and C's, and PyTorch's writer of zip files.
_WORDS = {"os error 28": errno.ENOSPC, "no space left on device": errno.ENOSPC, "os error 122": errno.EDQUOT}
_WORDS |= {"disk quota exceeded": errno.EDQUOT, "os error 27": errno.EFBIG, "file too large": errno.EFBIG}
_WORDS |= {"pytorchstreamwriter failed writing": errno.ENOSPC}


def as_error_of_ours(error: BaseException) -> PatchslimError | None:
    """What the user can do about ``error``, or about what it came from; None where it is a bug."""
    if isinstance(error, UsageError):
        return error
    ours = isinstance(error, PatchslimError)
    for cause in _chain(error):
        number = _number(cause)
        if number is not None and not (ours and number in _NAMES):  # what read the name has said what it is
            what, step = _PLACES[number]
            return UsageError(f"{_name(cause) or 'a file could not be written'}: {what}", next_step=step)
    if isinstance(error, PermissionError) and _name(error):
        return Unavailable(f"{_name(error)}: permission denied", next_step="name another place, or change its rights")
    return error if isinstance(error, PatchslimError) else None


def _number(error: BaseException) -> int | None:
    """Which of ``_PLACES`` it is, by its number or its words."""
    if isinstance(error, OSError) and error.errno in _PLACES:
        return error.errno
    if isinstance(error, PatchslimError):
        return None
    text = str(error).lower()
    return next((number for words, number in _WORDS.items() if words in text), None)


def _name(error: BaseException) -> str:
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return "" if name is None or isinstance(name, int) else os.fsdecode(name)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)

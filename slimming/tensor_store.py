"""Per-image tensors of any total size: in memory up to a bound, in unnamed temporary files past it."""

from __future__ import annotations

import os
import tempfile
import weakref

import torch
from torch import Tensor

#: Bytes of per-image state that one search may hold in memory before it spills.
DEFAULT_BOUND = 2 << 30


class TensorStore:
    """Hands out float32 tensors; once ``bound`` bytes are held, further ones live in files that the system may page out.

    A file is unlinked as soon as it is mapped, so that its space is free again when its tensor is, or when the process dies.
    """

    def __init__(self, bound: int = DEFAULT_BOUND) -> None:
        self.bound = bound
        self.held = 0
        self.spilled = 0

    def empty(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor of ``shape``. Raises ``OSError`` where the disk is full."""
        size = torch.Size(shape).numel()
        if self.held + 4 * size <= self.bound:
            self._count(4 * size)
            tensor = torch.empty(shape)
            weakref.finalize(tensor.untyped_storage(), self._count, -4 * size)
            return tensor
        with tempfile.NamedTemporaryFile(prefix="patchslim-", suffix=".f32") as file:
            os.posix_fallocate(file.fileno(), 0, 4 * size)  # a full disk fails here, not as a bus error when written to
            self.spilled += 4 * size
            return torch.from_file(file.name, shared=True, size=size).view(shape)

    def _count(self, size: int) -> None:
        self.held += size

"""Per-image tensors of any total size: in memory up to a bound, in unnamed temporary files past it."""

from __future__ import annotations

import tempfile

import torch
from torch import Tensor

#: Bytes of per-image state that one search may hold in memory before it spills.
DEFAULT_BOUND = 2 << 30


class TensorStore:
    """Hands out float32 tensors; once ``bound`` bytes are held, further ones live in files that the system may page out."""

    def __init__(self, bound: int = DEFAULT_BOUND) -> None:
        self.bound = bound
        self.held = 0
        self.spilled = 0
        self._files: list[tempfile._TemporaryFileWrapper[bytes]] = []

    def empty(self, *shape: int) -> Tensor:
        """An uninitialised tensor of ``shape``; raises ``OSError`` when the disk is full."""
        size = torch.Size(shape).numel()
        if self.held + 4 * size <= self.bound:
            self.held += 4 * size
            return torch.empty(shape)
        file = tempfile.NamedTemporaryFile(prefix="patchslim-", suffix=".f32")
        file.truncate(4 * size)
        self._files.append(file)
        self.spilled += 4 * size
        return torch.from_file(file.name, shared=True, size=size).view(shape)

    def close(self) -> None:
        """Delete the files; tensors handed out must not be used afterwards."""
        for file in self._files:
            file.close()
        self._files.clear()

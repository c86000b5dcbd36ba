"""The processes of one job (torchrun), and sums over them whose result does not depend on how many there are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

from patchslim.environment import processes, whole_number
from patchslim.errors import UsageError


@dataclass(frozen=True)
class ProcessGroup:
    """This process's ``rank`` among ``size`` processes. Work is shared out by batches: batch i belongs to rank ``i % size``."""

    rank: int = 0
    size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this process is the one that prints and writes files (rank 0)."""
        return self.rank == 0

    def own_batches(self, batches: int) -> list[int]:
        """Return the numbers, out of ``range(batches)``, of this process's batches."""
        return list(range(self.rank, batches, self.size))

    def sum_over_batches(self, own: Sequence[Tensor], batches: Sequence[int]) -> Tensor:
        """Return the float64 sum of one tensor per batch, added in the order of ``batches`` whichever process holds each.

        ``own`` are this process's tensors, one per own batch, in order and of one shape. Every process gets the same bits, and
        the same bits as a single process would.

        Raises ``ValueError`` where ``batches`` is empty.
        """
        if not batches:
            raise ValueError("no batches to add up")
        parts = self._gathered(own, batches) if self.size > 1 else list(own)
        result = parts[0].double()
        for part in parts[1:]:
            result = result + part
        return result

    def _gathered(self, own: Sequence[Tensor], batches: Sequence[int]) -> list[Tensor]:
        counts = [sum(batch % self.size == rank for batch in batches) for rank in range(self.size)]
        holder = next(rank for rank in range(self.size) if counts[rank])
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
        shape = [list(own[0].shape) if own else None]
        dist.broadcast_object_list(shape, src=holder, device=device)
        block = torch.zeros(max(counts), *(shape[0] or []), dtype=torch.float64, device=device)
        for index, part in enumerate(own):
            block[index] = part.double()
        gathered = [torch.empty_like(block) for _ in range(self.size)]
        dist.all_gather(gathered, block)
        queues = [iter(part.cpu()) for part in gathered]
        return [next(queues[batch % self.size]) for batch in batches]

    def all_reduce_sum(self, own: Tensor) -> Tensor:
        """Return the sum of one float64 tensor per process; every process gets the same bits."""
        if self.size == 1:
            return own
        moved = own.cuda() if dist.get_backend() == "nccl" else own.clone()
        dist.all_reduce(moved)
        return moved.to(own.device)

    def digest_over_batches(self, digests: Sequence[bytes], batches: int) -> str:
        """Return the SHA-256 over one digest per batch, in the order of the batches: the same on every process."""
        everyone: list[Sequence[bytes]] = [digests]
        if self.size > 1:
            everyone = [()] * self.size
            dist.all_gather_object(everyone, list(digests))
        queues = [iter(each) for each in everyone]
        return hashlib.sha256(b"".join(next(queues[batch % self.size]) for batch in range(batches))).hexdigest()

    def barrier(self) -> None:
        """Wait until every process has reached this call."""
        if self.size > 1:
            dist.barrier()


SINGLE_PROCESS = ProcessGroup()


def open_process_group(device: str = "cpu") -> ProcessGroup:
    """Join the job that torchrun started this process in (nccl on ``cuda``, else gloo); ``SINGLE_PROCESS`` without torchrun.

    Raises ``UsageError`` where torchrun's environment variables cannot be read.
    """
    if processes() == 1:
        return SINGLE_PROCESS
    if device == "cuda":
        torch.cuda.set_device(whole_number("LOCAL_RANK", 0))
    if not dist.is_initialized():
        try:
            dist.init_process_group("nccl" if device == "cuda" else "gloo")
        except ValueError as error:  # a variable that is missing or no number
            raise UsageError(f"the environment is not as torchrun makes it: {error}", next_step="unset WORLD_SIZE") from error
    return ProcessGroup(dist.get_rank(), dist.get_world_size())


def close_process_group() -> None:
    """Close PyTorch's process group, if one is open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def batch_slices(images: int, size: int) -> Iterator[slice]:
    """Yield the slices of consecutive batches of ``size`` images; the last one may be smaller."""
    for start in range(0, images, size):
        yield slice(start, min(start + size, images))

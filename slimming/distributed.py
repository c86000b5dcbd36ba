"""The processes that one job runs on (torchrun), and sums over all of them that do not depend on how many there are."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist


@dataclass(frozen=True)
class World:
    """This process's place among ``size``; work is dealt out by batches: batch i is process ``i % size``'s."""

    rank: int = 0
    size: int = 1

    def own(self, batches: int) -> list[int]:
        """The batches, of ``batches``, that are this process's."""
        return list(range(self.rank, batches, self.size))

    def total(self, own: Sequence[Tensor], batches: Sequence[int]) -> Tensor:
        """The sum of one float64 tensor per batch, added in the order ``batches`` whichever process each came from.

        ``own`` are this process's tensors, in order; batch i of ``batches`` is process ``i % size``'s. Every process gets the
        same bits, and the same as one process alone would. Raises ``ValueError`` without any batch.
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

    def added(self, own: Tensor) -> Tensor:
        """The sum of one float64 tensor per process; every process gets the same bits."""
        if self.size == 1:
            return own
        moved = own.cuda() if dist.get_backend() == "nccl" else own.clone()
        dist.all_reduce(moved)
        return moved.to(own.device)

    def same(self, digests: Sequence[bytes], batches: int) -> str:
        """SHA-256 over one digest per batch, in the order of the batches: the same on every process."""
        everyone: list[Sequence[bytes]] = [digests]
        if self.size > 1:
            everyone = [()] * self.size
            dist.all_gather_object(everyone, list(digests))
        queues = [iter(each) for each in everyone]
        return hashlib.sha256(b"".join(next(queues[batch % self.size]) for batch in range(batches))).hexdigest()

    @property
    def leads(self) -> bool:
        """Whether this process is the one that speaks and writes."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every process has come this far."""
        if self.size > 1:
            dist.barrier()


ALONE = World()


def join(device: str = "cpu") -> World:
    """The world that torchrun started this process in, its process group opened (nccl on GPUs, else gloo); alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return World(dist.get_rank(), dist.get_world_size())


def leave() -> None:
    """Close the process group, if one is open."""
    if dist.is_initialized():
        dist.destroy_process_group()


def chunks(images: int, size: int) -> Iterator[slice]:
    """Consecutive batches of ``size`` images."""
    for start in range(0, images, size):
        yield slice(start, min(start + size, images))

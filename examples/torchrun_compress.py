"""Compress one network on several processes or machines, each with its share of the batches.

torchrun --nproc-per-node 2 examples/torchrun_compress.py [--out compressed.safetensors] [--memory 4GiB]

Every process gathers on its own batches; the sums are added up, measurements and eliminations shared out, and
all end with the same network, which the first one writes. With CUDA devices, one for each process, NCCL.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from torch import Tensor, nn

import pysolve as ps

SAMPLES, BATCH = 512, 32


class Block(nn.Module):
    """A residual block of a perceptron."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def network(width: int = 64, inner: int = 300) -> nn.Module:
    """The same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(Block(width, inner), Block(width, inner), nn.Linear(width, 10)).eval()


def batches(rank: int, size: int, width: int = 64) -> list[Tensor]:
    """Every size-th batch, from number ``rank`` on: as a DataLoader with a batch sampler would give them."""
    random = torch.Generator().manual_seed(1)
    mixed = torch.randn(width, width, generator=random) / width**0.5
    every = [torch.randn(BATCH, width, generator=random) @ mixed for _ in range(SAMPLES // BATCH)]
    return every[rank::size]


def main(
    out: Path = Path("compressed.safetensors"),
    memory: Annotated[str | None, typer.Option(help="Of each process, such as 4GiB.")] = None,
    timeout: Annotated[int, typer.Option(help="Seconds to wait for another process.")] = 600,
) -> None:
    """Compress to half the MACs."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout))
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        result = ps.compress(
            network(),
            batches(rank, size),
            target={"macs": 0.5},
            memory=memory,
            process_group=dist.group.WORLD,
        )
        if rank == 0:
            typer.echo(str(result.report))
            ps.save(result, out)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)

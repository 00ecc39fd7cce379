"""A decoder of any size in plain torch: RMS norms, rotary attention, gated perceptrons; random weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Layers, widths and heads."""

    layers: int
    width: int
    inner: int
    heads: int
    words: int = 32000
    gated: bool = True


# Parameters in millions, by name.
SHAPES = {
    "125m": Shape(12, 768, 3072, 12, gated=False),
    "350m": Shape(24, 1024, 4096, 16, gated=False),
    "1.1b": Shape(22, 2048, 5632, 32),
}


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads = shape.heads
        self.q, self.k, self.v, self.o = (nn.Linear(shape.width, shape.width, bias=False) for _ in range(4))

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v)
        )
        q, k = rotated(q, turn), rotated(k, turn)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(shape.width), nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.up, self.down = (
            nn.Linear(*sizes, bias=False)
            for sizes in ((shape.width, shape.inner), (shape.inner, shape.width))
        )
        self.gate = nn.Linear(shape.width, shape.inner, bias=False) if shape.gated else None

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.norm1(x), turn)
        y = self.norm2(x)
        inner = F.gelu(self.up(y)) if self.gate is None else F.silu(self.gate(y)) * self.up(y)
        return x + self.down(inner)


class Decoder(nn.Module):
    """Logits of every token."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.words = nn.Embedding(shape.words, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm, self.head = nn.RMSNorm(shape.width), nn.Linear(shape.width, shape.words, bias=False)
        self.size = shape.width // shape.heads

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        steps = torch.arange(ids.shape[1], device=ids.device)[:, None]
        speed = 10000.0 ** (-torch.arange(0, self.size, 2, device=ids.device) / self.size)
        turn = (steps * speed).cos().to(x.dtype), (steps * speed).sin().to(x.dtype)
        for block in self.blocks:
            x = block(x, turn)
        return self.head(self.norm(x))


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = turn
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def decoder(shape: Shape, dtype: torch.dtype = torch.float32) -> nn.Module:
    """In evaluation mode; the same every time."""
    torch.manual_seed(0)
    return Decoder(shape).to(dtype).eval()


def tokens(shape: Shape, sequences: int, length: int, batch: int = 4) -> list[Tensor]:
    """Batches of random tokens."""
    random = torch.Generator().manual_seed(1)
    return list(torch.randint(shape.words, (sequences, length), generator=random).split(batch))

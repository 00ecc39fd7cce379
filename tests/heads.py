"""Small networks with attention whose code takes the size of a head from shapes, or from an attribute."""

import torch
from torch import nn
from torch.nn import functional as F

WIDTH, LENGTH, CLASSES = 8, 5, 3

# Scores of queries and keys, and what they make of values.
EQUATIONS = {
    "named": ("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"),
    "other order": ("bhkd,bhqd->bhqk", "bhkd,bhqk->bhqd"),
    "dots": ("...qd,...kd->...qk", "...qk,...kd->...qd"),
    "groups": ("bgrqd,bgkd->bgrqk", "bgrqk,bgkd->bqgrd"),
    "other groups": ("brgqd,bgkd->brgqk", "brgqk,bgkd->bqrgd"),
}


class Attention(nn.Module):
    """Self-attention; ``scale``: 1/√d "held" in an attribute, taken from "sizes", or "fixed" in the code.

    ``products``: by torch's function (False, "enable_gqa"), products (True) or one of ``EQUATIONS``.
    """

    def __init__(self, heads=3, groups=None, d=4, *, bias=True, scale="sizes", products=False):
        super().__init__()
        self.heads, self.groups, self.products = heads, groups or heads, products
        self.q = nn.Linear(WIDTH, heads * d, bias=bias)
        self.k, self.v = (nn.Linear(WIDTH, self.groups * d, bias=bias) for _ in range(2))
        self.o = nn.Linear(heads * d, WIDTH, bias=bias)
        if scale == "held":
            self.scaling = d**-0.5
        self.scale = 0.6 if scale == "fixed" else None

    def forward(self, x):
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, -1).transpose(1, 2)
        k, v = (one(x).view(b, t, self.groups, -1).transpose(1, 2) for one in (self.k, self.v))
        scale = getattr(self, "scaling", self.scale)
        if self.products in ("groups", "other groups"):
            of_scores, of_values = EQUATIONS[self.products]
            shape = (self.groups, -1) if self.products == "groups" else (-1, self.groups)
            scores = torch.einsum(of_scores, q.unflatten(1, shape), k)
            scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
            return self.o(torch.einsum(of_values, scores.softmax(-1), v).reshape(b, t, -1))
        if self.products == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)
            return self.o(y.transpose(1, 2).reshape(b, t, -1))
        k, v = (one.repeat_interleave(self.heads // self.groups, 1) for one in (k, v))
        if self.products in EQUATIONS:
            of_scores, of_values = EQUATIONS[self.products]
            order = slice(None, None, -1 if self.products == "other order" else 1)
            scores = torch.einsum(of_scores, *(q, k)[order])
            scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
            y = torch.einsum(of_values, *(scores.softmax(-1), v)[order])
        elif self.products:
            scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return self.o(y.transpose(1, 2).reshape(b, t, -1))


class Block(nn.Module):
    def __init__(self, hidden=12, **options):
        super().__init__()
        self.attend, self.up, self.down = (
            Attention(**options),
            nn.Linear(WIDTH, hidden),
            nn.Linear(hidden, WIDTH),
        )

    def forward(self, x):
        x = x + self.attend(x)
        return x + self.down(F.gelu(self.up(x)))


def network(seed=0, blocks=2, **options):
    torch.manual_seed(seed)
    layers = [Block(**options) for _ in range(blocks)]
    model = nn.Sequential(nn.Linear(6, WIDTH), *layers, nn.Linear(WIDTH, CLASSES)).eval()
    for name, parameter in model.named_parameters():
        if ".q." in name or ".k." in name:
            parameter.data *= 3.0
    return model


def inputs(n=64, seed=1):
    return torch.randn(n, LENGTH, 6, generator=torch.Generator().manual_seed(seed))


def of_rank(model, rank):
    """The network with queries, keys and values of so many dimensions in each head, wherever they lie."""
    generator = torch.Generator().manual_seed(5)
    for one in (module for module in model.modules() if isinstance(module, Attention)):
        d = one.q.out_features // one.heads
        for layer, heads in ((one.k, one.groups), (one.v, one.groups)):
            for h in range(heads):
                mix = torch.linalg.qr(torch.randn(d, d, generator=generator))[0][:, :rank]
                rows = slice(h * d, (h + 1) * d)
                layer.weight.data[rows] = mix @ mix.T @ layer.weight[rows]
                if layer.bias is not None:
                    layer.bias.data[rows] = mix @ mix.T @ layer.bias[rows]
    return model

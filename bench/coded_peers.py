"""Small files of trained networks by torch and zlib alone, and by pysolve's coding without reconstruction."""

import io
import zlib

import torch
from subjects import layers_of
from torch import Tensor, nn
from torch.nn.utils import prune as peer

import pysolve as ps
from pysolve.compressed import Compressed

# Of a weight: 16 values.
BITS = 4
ROUNDS = 60


def zipped(model: nn.Module, bits: int = BITS) -> int:
    """Give the weights of each layer the nearest of 2^bits means, in place; bytes by torch.save and zlib.

    Codes are stored as bytes, which zlib's own Huffman codes make shorter than pairs of them in a byte.
    """
    tensors = dict(model.state_dict())
    for name, layer in model.named_modules():
        if layer in layers_of(model):
            codes, values = means_of(layer.weight.detach(), 2**bits)
            with torch.no_grad():
                layer.weight.copy_(values[codes.long()])
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.codes": codes, f"{name}.values": values}
    file = io.BytesIO()
    torch.save(tensors, file)
    return len(zlib.compress(file.getvalue(), 9))


def means_of(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Codes and values of k-means by Lloyd's iterations from even steps; zeros are their own value."""
    zero = bool((weight == 0).any())
    rest = weight[weight != 0]
    values = torch.linspace(float(rest.min()), float(rest.max()), count - zero)
    for _ in range(ROUNDS):
        near = nearest(rest, values)
        sums = torch.zeros_like(values).index_add_(0, near, rest)
        sizes = torch.bincount(near, minlength=len(values))
        values = torch.where(sizes > 0, sums / sizes.clamp(min=1), values).sort().values
    if not zero:
        return nearest(weight, values).to(torch.uint8), values
    codes = torch.where(weight == 0, 0, 1 + nearest(weight, values))
    return codes.to(torch.uint8), torch.cat([values.new_zeros(1), values])


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """Which of ascending values is nearest."""
    return torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2)


def zeros_of(original: nn.Module, smaller: nn.Module) -> dict[str, float]:
    """Share of each layer's weights that a compressed network does without: channels and zeros."""
    return {
        name: 1 - int(smaller.get_submodule(name).weight.count_nonzero()) / layer.weight.numel()
        for name, layer in original.named_modules()
        if layer in layers_of(original)
    }


def make_sparse(model: nn.Module, zeros: dict[str, float]) -> None:
    """Zero the smallest weights of each layer, in place, by torch's own pruning."""
    for name, amount in zeros.items():
        layer = model.get_submodule(name)
        peer.l1_unstructured(layer, "weight", amount=amount)
        peer.remove(layer, "weight")


def coded(model: nn.Module, bits: int = BITS) -> Compressed:
    """Weights at the nearest of 2^bits means of each layer, zeros kept; for pysolve's own files."""
    return ps.quantize(model, scheme="codebook", bits=bits, method="nearest", progress=False)

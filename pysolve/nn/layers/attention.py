"""Attention with a layer for each projection, in the place of torch's, which keeps three in one tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, scaled_dot_product_attention

from pysolve.errors import LayerNotFoundError
from pysolve.nn.layers.base import HOOKS
from pysolve.nn.running import Ignored, find_matching
from pysolve.nn.state import copy_of

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """``nn.MultiheadAttention`` with a Linear layer for each projection, and heads of any number and size.

    Of h heads of size d,  y = W_o concat_i softmax(q_i k_iᵀ / √d + mask) v_i + b_o , the projections q, k
    and v of width h d, which need not be that of the inputs. Called like torch's, with the same results.

    Parameters
    ----------
    num_heads, head_dim : int
    q_proj, k_proj, v_proj, out_proj : nn.Linear
    dropout : float
        Of attention's weights, in training.
    batch_first : bool
        Whether samples come before positions.
    """

    # What torch's encoder layers ask before they pass a layer's own code by.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        out_proj: nn.Module,
        *,
        dropout: float = 0.0,
        batch_first: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, head_dim
        self.dropout, self.batch_first = dropout, batch_first
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q_proj, k_proj, v_proj, out_proj

    @classmethod
    def of(cls, layer: nn.MultiheadAttention) -> Attention:
        """The same attention, whose parameters share their values with the layer's."""
        # Torch's stubs know tensors alone where there may be none.
        weight: Tensor | None = layer.in_proj_weight
        bias: Tensor | None = layer.in_proj_bias
        apart = [getattr(layer, f"{name}_weight") for name in PROJECTIONS]
        weights = apart if weight is None else _thirds(weight)
        biases = [None] * 3 if bias is None else _thirds(bias)
        made = [_linear(one, own) for one, own in zip(weights, biases, strict=True)]
        out = _linear(layer.out_proj.weight, layer.out_proj.bias)
        out.weight, out.bias = layer.out_proj.weight, layer.out_proj.bias
        q, k, v = made
        first = bool(layer.batch_first)
        found = cls(layer.num_heads, layer.head_dim, q, k, v, out, dropout=layer.dropout, batch_first=first)
        for name in HOOKS:
            getattr(found, name).update(getattr(layer, name))
        return found.train(layer.training)

    @property
    def embed_dim(self) -> int:
        """Width of queries before their projection."""
        width: Any = self.q_proj.in_features
        return int(width)

    @property
    def in_proj_weight(self) -> Tensor | None:
        """The projections' weights, one below the other, if they read inputs of one width."""
        weights: list[Any] = [getattr(self, name).weight for name in PROJECTIONS]
        return torch.cat(weights) if len({one.shape[1] for one in weights}) == 1 else None

    @property
    def in_proj_bias(self) -> Tensor | None:
        """The projections' biases in one, if there are some; zeros where one has none."""
        biases: list[Any] = [getattr(self, name).bias for name in PROJECTIONS]
        some = next((one for one in biases if one is not None), None)
        # Torch's encoder layers ask before every call.
        return (
            None
            if some is None
            else torch.cat([torch.zeros_like(some) if one is None else one for one in biases])
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Outputs, and the weights of attention if they are needed, as torch's layer has them."""
        batched, first = query.dim() == 3, self.batch_first
        # What is one tensor stays one, of which products are summed once.
        given = {id(one): one for one in (query, key, value)}
        if not batched:
            given = {i: one.unsqueeze(0) for i, one in given.items()}
        elif not first:
            given = {i: one.transpose(0, 1) for i, one in given.items()}
        query, key, value = (given[id(one)] for one in (query, key, value))
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask must be given where is_causal says that it is causal.")
        # Torch takes the word for the mask where it needs no other.
        is_causal = is_causal and key_padding_mask is None and not need_weights
        mask = None if is_causal else self._mask(key_padding_mask, attn_mask, query)
        q = self._heads(self.q_proj(query))
        k = self._heads(self.k_proj(key))
        v = self._heads(self.v_proj(value))
        p = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.transpose(-2, -1)
            # Under autocast masks have more digits than scores.
            weights = (scores if mask is None else scores + mask.to(scores.dtype)).softmax(-1)
            weights = dropout(weights, p) if p else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = scaled_dot_product_attention(q, k, v, mask, p, is_causal)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if first else output.transpose(0, 1), weights

    def _heads(self, x: Tensor) -> Tensor:
        """(N, T, h d) projections as (N, h, T, d)."""
        return x.view(*x.shape[:-1], self.num_heads, self.head_dim).transpose(1, 2)

    def _mask(self, padding: Tensor | None, mask: Tensor | None, like: Tensor) -> Tensor | None:
        """What is added to the scores, for (N, h, T, S)."""
        found = None
        if mask is not None:
            found = _added(mask, like)
            heads = self.num_heads
            found = found.view(-1, heads, *found.shape[1:]) if found.dim() == 3 else found
        if padding is not None:
            own = _added(padding, like)[..., None, None, :]
            found = own if found is None else found + own
        return found


class Transformer(nn.Transformer):
    """Torch's, of which encoder and decoder may have any width, and not the same."""

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch's, which compares both widths with ``d_model``."""
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        output: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            tgt_is_causal,
            memory_is_causal,
        )
        return output


def openable(model: nn.Module) -> dict[str, nn.MultiheadAttention]:
    """Torch's attention that ``opened`` can replace: its parts are its own, and as torch makes them."""
    kind = nn.MultiheadAttention
    found = {name: one for name, one in model.named_modules() if type(one) is kind and _is_plain(one)}
    if not found:
        return {}
    parts = (
        part for one in model.modules() for part in chain(one._parameters.values(), one._modules.values())
    )
    owners = Counter(map(id, parts))
    return {
        name: one
        for name, one in found.items()
        if all(owners[id(own)] == 1 for own in (*one.parameters(), one.out_proj))
    }


def opened(model: nn.Module, names: Collection[str] | None = None) -> nn.Module:
    """The network with a layer for each projection of torch's attention, of some names or of all.

    Where there is any, another network with the same parameters.
    """
    found = {name: one for name, one in openable(model).items() if names is None or name in names}
    if not found:
        return model
    network = with_layers(model, {one: Attention.of(one) for one in found.values()})
    for module in network.modules():
        adapt(module, module)
    return network


def together(attention: Attention, like: nn.MultiheadAttention) -> nn.MultiheadAttention:
    """Torch's layer with the values of the projections, its settings those of another one."""
    layer = copy_of(like)
    # Torch's stubs know tensors alone where there may be none.
    weight: Tensor | None = layer.in_proj_weight
    with torch.no_grad():
        if weight is not None:
            weight.copy_(torch.cat([getattr(attention, name).weight for name in PROJECTIONS]))
        else:
            for name in PROJECTIONS:
                getattr(layer, f"{name}_weight").copy_(getattr(attention, name).weight)
        if (bias := attention.in_proj_bias) is not None:
            layer.in_proj_bias.copy_(bias)
        layer.out_proj.load_state_dict(attention.out_proj.state_dict())
    return layer.train(attention.training)


def with_layers(model: nn.Module, layers: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Another network with the same parameters, in which these layers have others in their place."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy_of(model, memo | {id(old): new for old, new in layers.items()})


def adapt(module: nn.Module, like: nn.Module) -> None:
    """Let a module around attention, made of another one, know whether there is any that is opened."""
    own = has_opened(module)
    if isinstance(module, nn.TransformerEncoder) and isinstance(like, nn.TransformerEncoder):
        # Its nested tensors are for torch's attention alone.
        vars(module)["use_nested_tensor"] = like.use_nested_tensor and not own
    elif type(module) in (nn.Transformer, Transformer) and isinstance(like, nn.Transformer):
        module.__class__ = Transformer if own else nn.Transformer


def has_opened(network: nn.Module) -> bool:
    """Whether attention with a layer for each projection is in it."""
    return any(isinstance(one, Attention) for one in network.modules())


def ignored_in_opened(model: nn.Module, ignore: Iterable[Ignored]) -> set[str]:
    """Names of the layers of the opened network that entries of ``ignore`` stand for, there or here.

    Raises
    ------
    LayerNotFoundError, TypeError, ValueError
        As ``find_matching`` does.
    """
    network = opened(model)
    given: object = ignore
    if network is model or isinstance(given, str | type | nn.Module) or not isinstance(given, Iterable):
        return find_matching(model, ignore)
    names = set[str]()
    for one in ignore:
        inside = set[str]()
        with suppress(LayerNotFoundError):
            inside = find_matching(network, [one])
        names |= inside or find_matching(network, find_matching(model, [one]))
    return names


def _is_plain(layer: nn.MultiheadAttention) -> bool:
    """Whether it is no more than projections, and nothing hangs on their weights."""
    fused = layer._qkv_same_embed_dim
    tensors = {"in_proj_weight"} if fused else {f"{name}_weight" for name in PROJECTIONS}
    hooks = any(getattr(layer.out_proj, one) for one in HOOKS)
    more = layer.bias_k is not None or layer.add_zero_attn
    return not hooks and not more and tensors | {"out_proj.weight"} <= dict(layer.named_parameters()).keys()


def _thirds(tensor: Tensor) -> list[Tensor]:
    """The parts of a parameter for queries, keys and values, trained as it is."""
    # A part says so itself only where gradients are recorded.
    return [part.detach().requires_grad_(tensor.requires_grad) for part in tensor.chunk(3)]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A layer whose parameters share their values with these."""
    # Without values, and the random numbers that these would take.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), bias.requires_grad)
    return layer


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as what is added to scores: -∞ where a boolean one is true."""
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill_(mask, -torch.inf)

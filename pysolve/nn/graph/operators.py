"""Label rules of tensor operators: keep labels, move them, unite them, or pin them."""

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from pysolve.nn.graph.calls import Call, Labels, is_filled, meet, pointwise
from pysolve.nn.graph.classes import complete, labelled, lean, none, squashed
from pysolve.nn.graph.dimension_rules import contract_dims, dimensions, einsum_dims, named_dimensions
from pysolve.nn.graph.norms import through_norm

Rule = Callable[[Call], Labels]


def shape(call: Call) -> Labels:
    """Labels move as the values do."""
    args, kwargs = call.given
    moved: Labels = getattr(torch.ops.aten, call.name)(*args, **kwargs)
    return moved


def view(call: Call) -> Tensor:
    """Labels are reshaped: their strides need not allow a view."""
    return call.first.reshape(call.args["size"] if "size" in call.args else call.args["other"].shape)


def keep(call: Call) -> Tensor:
    """The first argument's labels."""
    return call.first


def unlabelled(call: Call) -> Labels:
    """Only the type of the first argument matters."""
    result: Labels = call.result
    return result


def cat(call: Call) -> Tensor:
    """Concatenation; values that vary only along other dimensions must keep equal channels there."""
    tensors = [(value, node) for value, node in call.tensors if value.ndim > 1 or value.numel()]
    dim = call.args["dim"] % tensors[0][0].ndim
    tensors = _like_others(tensors, dim)
    values = [value for value, _ in tensors]
    flat = [(value, node) for value, node in tensors if squashed(value).shape[dim] == 1]
    varied = [(v, node) for v, node in flat if squashed(v).numel() > 1 or not labelled(v)]
    if varied:
        meet(call, [(value.narrow(dim, 0, 1), node) for value, node in varied])
    return torch.cat(values, dim)


def _like_others(tensors: list[tuple[Tensor, Node]], dim: int) -> list[tuple[Tensor, Node]]:
    """Values of one number everywhere have the channels of those that they are joined with."""
    known = [value for value, node in tensors if not is_filled(node)]
    if len(known) == len(tensors) or not known or squashed(lean(known[0])).shape[dim] > 1:
        return tensors
    row = lean(known[0]).narrow(dim, 0, 1)
    return [(row.expand(value.shape) if is_filled(node) else value, node) for value, node in tensors]


def stack(call: Call) -> Tensor:
    """Stacked values must keep equal channels."""
    tensors = _like_others([(value[None], node) for value, node in call.tensors], 0)
    meet(call, tensors)
    return torch.stack([value[0] for value, _ in tensors], call.args["dim"])


def split(call: Call) -> list[Tensor]:
    """Equal pieces must stay equally large: unite their first channels, their second ones, and so on."""
    pieces = list(shape(call))
    varied = squashed(call.first).shape[call.args["dim"]] > 1
    if varied and len({piece.shape for piece in pieces}) == 1:
        call.ledger.mix(torch.stack(pieces), (0,), call.says("cuts them into equal pieces"))
    return pieces


def glu(call: Call) -> Tensor:
    """One half times a function of the other."""
    halves = call.first.chunk(2, call.args["dim"])
    return meet(call, [(half, call.sources["self"]) for half in halves])


def reduction(call: Call) -> Labels:
    """Channels that are summed are united, but for those of a norm that can do with fewer."""
    dims = _dims(call)
    if call.name == "mean" and through_norm(call):
        return unlabelled(call)
    top = call.ledger.mix(call.first, dims, call.says("mixes these channels"))
    if dims and not call.args.get("keepdim", False):
        top = top.squeeze(dims)
    return [top] * len(call.result) if isinstance(call.result, list) else top


def mixture(call: Call) -> Labels:
    """Channels that are normalised, accumulated or sorted along a dimension are united."""
    call.ledger.mix(call.first, _dims(call), call.says("mixes these channels"))
    return [call.first] * len(call.result) if isinstance(call.result, list) else call.first


def spectrum(call: Call) -> Tensor:
    """Values along some dimensions, the last ones by default, become others there."""
    top = call.ledger.mix(call.first, _dims(call), call.says("mixes these channels"))
    return top.expand(call.result.shape)


def complex_pairs(call: Call) -> Tensor:
    """Real and imaginary parts lie along a last dimension of their own, or do so no longer."""
    if call.name == "view_as_real":
        return call.first.unsqueeze(-1).expand(call.result.shape)
    return call.ledger.mix(call.first, (-1,), call.says("makes one number of two channels")).squeeze(-1)


def topk(call: Call) -> list[Tensor]:
    """Every channel may end up at every place."""
    top = call.ledger.mix(call.first, _dims(call), call.says("mixes these channels"))
    return [top.expand(result.shape) for result in call.result]


def _dims(call: Call) -> tuple[int, ...]:
    """Dimensions that an operator works along: all, when it names none."""
    dims = call.args.get("dim")
    if dims is None or dims == []:
        return tuple(range(call.first.ndim))
    return tuple(dim % max(call.first.ndim, 1) for dim in (dims if isinstance(dims, list) else [dims]))


def index(call: Call) -> Labels:
    """Positions may be picked by index or mask; channels may not, as their indices change."""
    return _picked(call)[0]


def put(call: Call) -> Labels:
    """Values take the places that are picked by index or mask, or are added there."""
    picked, dims, own = _picked(call)
    values = call.args["values"].expand(picked.shape)
    call.ledger.pin_varying(values, own, call.says("picks channels by number"))
    top = values.amax(own, keepdim=True).flatten(own[0], own[-1])
    top = top.unflatten(own[0], [1] * len(dims)).expand(call.first.shape)
    return meet(call, [(call.first, call.sources["self"]), (top, call.sources["values"])])


def _picked(call: Call) -> tuple[Tensor, list[int], list[int]]:
    """What an operator picks by indices, and along which dimensions of its operand and of the result."""
    indices: list[Tensor | None] = []
    for labels, node in zip(call.args["indices"], call.sources["indices"], strict=True):
        # A mask counts as the positions where it is true, two of them.
        mask = [torch.zeros(2, dtype=torch.long)] * labels.ndim if _is_mask(node) else None
        indices += mask or [None if labels is None else torch.zeros_like(labels)]
    dims = [dim for dim, one in enumerate(indices) if one is not None]
    how = "by a mask" if any(map(_is_mask, call.sources["indices"])) else "channels by number"
    call.ledger.pin_varying(call.first, dims, call.says(f"picks {how}"))
    for labels in filter(lambda one: one is not None, call.args["indices"]):
        call.ledger.pin(labels, call.says("takes them for positions"))
    picked: Tensor = torch.ops.aten.index(call.first, indices)
    # Indices with others between them put their dimensions in front.
    start = dims[0] if dims == [*range(dims[0], dims[-1] + 1)] else 0
    return picked, dims, [*range(start, start + picked.ndim - call.first.ndim + len(dims))]


def _pin_others(call: Call) -> None:
    for value, _ in call.tensors[1:]:
        call.ledger.pin(value, call.says("takes them for positions"))


def _is_mask(source: object) -> bool:
    return isinstance(source, Node) and source.meta["val"].dtype in (torch.bool, torch.uint8)


def gather(call: Call) -> Tensor:
    """As ``index``, along one dimension."""
    dim = call.args["dim"]
    call.ledger.pin_varying(call.first, (dim,), call.says("picks channels by number"))
    _pin_others(call)
    numbers = torch.zeros_like(call.args["index"])
    if call.name == "index_select":
        return call.first.index_select(dim, numbers)
    return call.first.gather(dim, numbers)


def accumulate(call: Call) -> Labels:
    """Rows are added to others, or take their place, along a dimension that holds no channels."""
    dim, name = call.args["dim"], next((one for one in ("source", "src") if one in call.args), "")
    call.ledger.pin_varying(call.first, (dim,), call.says("picks channels by number"))
    call.ledger.pin(call.args["index"], call.says("takes them for positions"))
    into = (call.first, call.sources["self"])
    if not name:
        return call.first
    rows = call.args[name]
    call.ledger.pin_varying(rows, (dim,), call.says("picks channels by number"))
    top = rows.amax(dim, keepdim=True) if rows.shape[dim] else none(call.result.shape)
    return meet(call, [into, (top.expand(call.result.shape), call.sources[name])])


def pool(call: Call) -> Labels:
    """Pooling and resampling work along the last dimensions, where labels do not vary."""
    digit = re.search("[123](?=d)", call.name)
    dims = tuple(range(-int(digit[0]) if digit else 2 - call.first.ndim, 0))
    _pin_others(call)
    call.ledger.pin_varying(call.first, dims, call.says("mixes these channels"), wildcard=True)
    top = call.first.amax(dims, keepdim=True)
    if isinstance(call.result, list):
        return [top.expand(result.shape) for result in call.result]
    return top.expand(call.result.shape)


def pixel_shuffle(call: Call) -> Tensor:
    """The channels that become one channel's pixels go together."""
    factor = call.args["upscale_factor"] ** 2
    labels = _without_positions(call)
    blocks = labels.reshape(*labels.shape[:-3], -1, factor, 1, 1)
    top = call.ledger.mix(blocks, (-3,), call.says("makes one channel of several")).squeeze(-3)
    return top.expand(call.result.shape)


def pixel_unshuffle(call: Call) -> Tensor:
    """Each channel becomes several, which go together."""
    labels = _without_positions(call).repeat_interleave(call.args["downscale_factor"] ** 2, -3)
    return labels.expand(call.result.shape)


def windows(call: Call) -> Tensor:
    """Each channel becomes one for every place of a window, which go together."""
    height, width = call.args["kernel_size"]
    labels = _without_positions(call).squeeze(-1).repeat_interleave(height * width, -2)
    return labels.expand(call.result.shape)


def _without_positions(call: Call) -> Tensor:
    """Labels of images with size 1 along height and width, along which they must not vary."""
    call.ledger.pin_varying(call.first, (-2, -1), call.says("moves these channels"), wildcard=True)
    return call.first.amax((-2, -1), keepdim=True)


def channel_shuffle(call: Call) -> Labels:
    """Groups must keep equal channels: unite their first ones, their second ones, and so on."""
    groups = call.first.chunk(call.args["groups"], 1)
    call.ledger.mix(torch.stack(groups), (0,), call.says("shuffles equal groups"))
    return shape(call)


def matmul(call: Call) -> Tensor:
    """Rows times columns; summed channels are united in each row and column."""
    (a, first), (b, second) = call.tensors
    left, right = a[None] if a.ndim == 1 else a, b[None] if b.ndim == 1 else b.mT
    product = _contract(call, (left, first), (right, second))
    return product.squeeze(tuple(dim for dim, factor in ((-2, a), (-1, b)) if factor.ndim == 1))


def _contract(call: Call, left: tuple[Tensor, Node], right: tuple[Tensor, Node]) -> Tensor:
    """(…, n, m) labels of Σ_k left[…, n, k] right[…, m, k].

    One head that serves many (multi-query attention) stays, and the others can go one by one.
    """
    if call.network.inner:
        return contract_dims(call, left, right)
    a, b = lean(left[0]).unsqueeze(-2), lean(right[0]).unsqueeze(-3)
    for many, one in ((a, b), (b, a)):
        if _serves(one, many):
            call.ledger.pin(one, call.says("uses these channels for every head"))
            call.ledger.mix(one, (-2, -1), call.says("uses these channels for every head"))
            top = call.ledger.mix(many, (-1,), call.says("mixes these channels"))
            return top.expand(*torch.broadcast_shapes(top.shape, one.shape)[:-1], 1).squeeze(-1)  # type: ignore
    pair = [(a, left[1]), (b, right[1])]
    return call.ledger.mix(meet(call, pair), (-1,), call.says("mixes these channels")).squeeze(-1)


def _serves(one: Tensor, many: Tensor) -> bool:
    """Whether channels of one head meet those of several, which are the dimensions before (n, m, k)."""
    heads, own = (squashed(labels).shape[:-3] for labels in (many, one))
    return complete(many) and labelled(one) and max(own, default=1) == 1 and max(heads, default=1) > 1


def biased_matmul(call: Call) -> Tensor:
    """A sum of a value and a matrix product."""
    bias, left, right = call.tensors
    product = _contract(call, left, (right[0].mT, right[1]))
    return meet(call, [bias, (product, left[1])])


def attention(call: Call) -> Tensor:
    """softmax(queries · keys + mask) · values, the queries of a group sharing keys and values."""
    query, key, value = (call.args[name] for name in ("query", "key", "value"))
    if call.args.get("enable_gqa"):
        groups = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
        key, value = map(lean, groups)
    if call.network.inner:
        return dimensions(call, query, key, value)
    scores = _contract(call, (query, call.sources["query"]), (key, call.sources["key"]))
    if isinstance(call.args["attn_mask"], Tensor):
        mask = (call.args["attn_mask"], call.sources["attn_mask"])
        scores = meet(call, [(scores, call.sources["query"]), mask])
    return _contract(call, (scores, call.sources["query"]), (value.mT, call.sources["value"]))


def einsum(call: Call) -> Labels:
    """As ``matmul``, for equations that name every dimension of every operand once."""
    equation = call.args["equation"].replace(" ", "")
    inputs, output = named_dimensions(equation, [value.ndim for value, _ in call.tensors])
    if "->" not in equation or any(len(set(term)) < len(term) for term in (*inputs, output)):
        return call.opaque(call.says("is not understood in this form"))
    if call.network.inner and einsum_dims(call, inputs, output):
        result: Labels = call.result
        return result
    letters = output + "".join(sorted(set("".join(inputs)) - {*output}))
    aligned = []
    for term, (value, node) in zip(inputs, call.tensors, strict=True):
        order = [letter for letter in letters if letter in term]
        value = value.permute([term.index(letter) for letter in order])
        aligned.append((value[tuple(slice(None) if x in term else None for x in letters)], node))
    summed = tuple(range(len(output), len(letters)))
    mixed = call.ledger.mix(meet(call, aligned), summed, call.says("mixes these channels"))
    return mixed.squeeze(summed) if summed else mixed


_NAMES: dict[Rule, str] = {
    shape: """
        permute transpose t numpy_T mT adjoint movedim moveaxis swapaxes swapdims flatten unflatten
        unsqueeze squeeze slice select narrow expand broadcast_to repeat repeat_interleave tile unbind
        diagonal flip roll unfold reshape atleast_1d atleast_2d atleast_3d
    """,
    view: "view _unsafe_view view_as reshape_as",
    unlabelled: "new_ones new_zeros new_full new_empty",
    keep: """
        dropout feature_dropout alpha_dropout feature_alpha_dropout contiguous clone to _to_copy type_as
        detach alias lift_fresh lift_fresh_copy positive requires_grad fill zero bernoulli tril triu
        zeros_like ones_like full_like rand_like randn_like empty_like real imag _conj resolve_conj
        resolve_neg
    """,
    complex_pairs: "view_as_complex view_as_real",
    # Elementwise, though torch does not tag them so.
    pointwise: """
        hardswish log_sigmoid where masked_fill relu6 threshold mish copy expand_as rsub negative absolute
        multiply subtract divide true_divide floor_divide __and__ __or__ __xor__
    """,
    reduction: """
        mean sum nansum nanmean amax amin max min prod var std var_mean std_mean norm any all median
        linalg_vector_norm logsumexp argmax argmin count_nonzero nanmedian mode
    """,
    mixture: """
        softmax _softmax log_softmax _log_softmax cumsum cumprod cummax cummin logcumsumexp sort argsort
    """,
    spectrum: """
        fft_fft fft_ifft fft_rfft fft_irfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
        fft_rfftn fft_irfftn
    """,
    split: "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split",
    pool: """
        max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_max_pool1d
        adaptive_max_pool2d adaptive_max_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices fractional_max_pool1d
        fractional_max_pool2d fractional_max_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
        _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d upsample_linear1d
        upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa grid_sampler
    """,
    pixel_shuffle: "pixel_shuffle",
    pixel_unshuffle: "pixel_unshuffle",
    channel_shuffle: "channel_shuffle native_channel_shuffle",
    matmul: "matmul bmm mm mv dot",
    biased_matmul: "addmm baddbmm",
    gather: "gather index_select",
    accumulate: "index_add index_copy index_fill index_reduce scatter scatter_add scatter_reduce",
    windows: "im2col",
    cat: "cat",
    stack: "stack",
    glu: "glu",
    topk: "topk",
    index: "index",
    put: "index_put",
    einsum: "einsum",
    attention: "scaled_dot_product_attention",
}
RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}

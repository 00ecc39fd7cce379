"""Label rules of attention by dimension: each is one channel of queries, keys and values, in all heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_letters

from torch import Tensor
from torch.fx import Node

from pysolve.nn.graph.calls import Call, meet
from pysolve.nn.graph.classes import Attended, labelled, lean, none, squashed

# Most operators between scores and what they weigh.
_STEPS = 12


def contract_dims(call: Call, left: tuple[Tensor, Node], right: tuple[Tensor, Node]) -> Tensor:
    """(…, n, m) labels of Σ_k left[…, n, k] right[…, m, k]: queries with keys, or scores with values."""
    if labelled(left[0]) and labelled(right[0]):
        call.network.scored[call.node] = left[0], right[0]
        _together(call, left[0], right[0])
        return none((*call.result.shape[:-2], left[0].shape[-2], right[0].shape[-2]))
    scored = call.network.scored.get(_scores(call.network.scored, left[1]) or call.node)
    if scored is None or not labelled(right[0]):
        both = [(left[0].unsqueeze(-2), left[1]), (right[0].unsqueeze(-3), right[1])]
        return call.ledger.mix(meet(call, both), (-1,), call.says("mixes these channels")).squeeze(-1)
    return dimensions(call, *scored, right[0].mT)


def dimensions(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What heads make of their values, (…, heads, positions, d)."""
    _attend(call, query, key, value)
    if isinstance(mask := call.args.get("attn_mask"), Tensor):
        call.ledger.pin(mask, call.says("adds these channels"))
    top = call.ledger.mix(value, (-2,), call.says("mixes these channels"))
    return top.expand(*call.result.shape[:-1], -1)


def einsum_dims(call: Call, inputs: Sequence[str], output: str) -> bool:
    """Follow dimensions of heads through an equation; whether it multiplies queries with keys.

    Of scores with values, channels of the result are those of any equation.
    """
    summed = "".join({*"".join(inputs)} - {*output})
    pairs = [(term, lean(value), node) for term, (value, node) in zip(inputs, call.tensors, strict=True)]
    if len(pairs) != 2 or len(summed) != 1:
        return False
    if all(labelled(value) for _, value, _ in pairs):
        # Queries number the rows of the scores.
        apart = {*inputs[0]} ^ {*inputs[1]}
        pairs.sort(key=lambda one: min(map(output.find, {*one[0]} & apart), default=0))
        (first, x, _), (second, y, _) = pairs
        heads = _heads(first, x, summed)
        if not {*_heads(second, y, summed)} <= {*heads}:
            return False
        sizes = {letter: size for letter, size in zip(first, x.shape, strict=True) if letter in heads}
        query, key = (_by_heads(term, value, sizes, summed) for term, value in ((first, x), (second, y)))
        call.network.scored[call.node] = query, key
        _together(call, query, key)
        return True
    (first, x, _), (second, _, scores) = pairs if labelled(pairs[0][1]) else pairs[::-1]
    inner = "".join({*first} - {*second})
    found = _scores(call.network.scored, scores)
    if found is not None and labelled(x) and len(inner) == 1:
        query, key = call.network.scored[found]
        heads = _heads(first, x, inner)
        sizes = {letter: size for letter, size in zip(first, x.shape, strict=True) if letter in heads}
        value, count = _by_heads(first, x, sizes, inner), query.shape[-3]
        if count % len(value) == 0:
            _attend(call, query, key, value.repeat_interleave(count // len(value), 0))
    return False


def _heads(term: str, labels: Tensor, inner: str) -> str:
    """The dimensions along which labels vary, but for those inside of heads."""
    sizes = zip(term, squashed(labels).shape, strict=True)
    return "".join(letter for letter, size in sizes if size > 1 and letter != inner)


def _by_heads(term: str, labels: Tensor, heads: Mapping[str, int], inner: str) -> Tensor:
    """(heads, 1, d) labels, the same for heads whose dimension the term has not."""
    order = [letter for letter in (*heads, inner) if letter in term]
    core = labels[tuple(slice(None) if letter in order else 0 for letter in term)]
    left = [letter for letter in term if letter in order]
    core = core.permute([left.index(letter) for letter in order])
    core = core[tuple(slice(None) if letter in order else None for letter in (*heads, inner))]
    return core.expand(*heads.values(), -1).reshape(-1, 1, core.shape[-1])


def named_dimensions(equation: str, ndims: Sequence[int]) -> tuple[list[str], str]:
    """Terms of an equation, and of its result, with letters in the place of dots."""
    terms, _, output = equation.partition("->")
    inputs = terms.split(",")
    free = [letter for letter in ascii_letters if letter not in equation]
    counts = [n - len(term.replace("...", "")) for n, term in zip(ndims, inputs, strict=True)]
    more = max([0, *(n for n, term in zip(counts, inputs, strict=True) if "..." in term)])
    own = "".join(free[:more])
    found = [term.replace("...", own[more - n :]) for n, term in zip(counts, inputs, strict=True)]
    return found, output.replace("...", own)


def _attend(call: Call, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Attention of these queries, keys and values, whose dimensions go together."""
    call.network.attended.append(Attended(call.node, query, key, value))
    _together(call, query, key, value)


def _scores(scored: Mapping[Node, object], node: Node) -> Node | None:
    """The product of queries and keys that softmax and the like have made a value of."""
    near = [node]
    for _ in range(_STEPS):
        found = next((one for one in near if one in scored), None)
        if found is not None:
            return found
        near = [*dict.fromkeys(other for one in near for other in one.all_input_nodes)]
    return None


def _together(call: Call, *values: Tensor) -> None:
    """Unite the last dimensions of values, over all of the others."""
    reason = call.says("multiplies these channels")
    tops = [call.ledger.mix(one, range(one.ndim - 1), reason) for one in values]
    call.ledger.unite(*(one.reshape(-1) for one in tops))

"""Users' hooks while a network is traced: those that only look on are left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.nn.outputs import tensors_of
from pysolve.nn.running import Batch, forward
from pysolve.nn.state import version

# Old weight norms and the like put the weight in its place before every call.
_COMPUTED = ("weight", "bias")


@contextmanager
def acting_hooks(model: nn.Module, batch: Batch) -> Iterator[None]:
    """Inside, of a network's forward hooks only those are left that change what it computes.

    They would be given tensors without values. A hook acts if, while the network runs on the batch, it
    returns something, writes into what it is given, or sets its layer's weight; torch's own are taken to, and
    all of them where the network fails, or without the others fails or returns other tensors: it may use what
    they note down.
    """
    found = [hooks for layer in model.modules() for hooks in (layer._forward_pre_hooks, layer._forward_hooks)]
    foreign = [(hooks, key) for hooks in found for key, hook in hooks.items() if not _of_torch(hook)]
    if not foreign:
        yield
        return
    before = [(hooks, dict(hooks)) for hooks in found]
    seen, acting = set[tuple[int, int]](), {(id(hooks), key) for hooks, key in foreign}
    try:
        for hooks, key in foreign:
            hooks[key] = partial(_watched, hooks[key], partial(seen.add, (id(hooks), key)))
        with suppress(Exception):
            wanted = _shapes(model, batch)
            acting = seen
        for hooks, items in before:
            hooks.update(items)
        for hooks, key in foreign:
            if (id(hooks), key) not in acting:
                del hooks[key]
        if acting is seen and not _returns(model, batch, wanted):
            for hooks, items in before:
                hooks.clear()
                hooks.update(items)
        yield
    finally:
        for hooks, items in before:
            hooks.clear()
            hooks.update(items)


def _shapes(model: nn.Module, batch: Batch) -> list[torch.Size]:
    return [one.shape for one in tensors_of(forward(model, batch))]


def _returns(model: nn.Module, batch: Batch, wanted: list[torch.Size]) -> bool:
    """Whether a network runs, and returns tensors of these shapes."""
    with suppress(Exception):
        return _shapes(model, batch) == wanted
    return False


def _watched(
    hook: Callable[..., object], note: Callable[[], None], layer: nn.Module, *given: object
) -> object:
    """A hook's result; ``note`` is called where it acts."""
    tensors = [one for one in pytree.tree_leaves(given) if isinstance(one, Tensor)]
    before = [*map(version, tensors)], [id(vars(layer).get(name)) for name in _COMPUTED]
    result = hook(layer, *given)
    after = [*map(version, tensors)], [id(vars(layer).get(name)) for name in _COMPUTED]
    if result is not None or before != after:
        note()
    return result


def _of_torch(hook: object) -> bool:
    return getattr(hook, "__module__", None) is not None and str(hook.__module__).startswith("torch.")

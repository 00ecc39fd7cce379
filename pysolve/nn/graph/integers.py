"""Integers in a network's own modules that count a site's channels: heads, and widths made of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, combinations, takewhile

from torch import nn

from pysolve.nn.running import Batch, evaluating, forward, in_training
from pysolve.nn.state import copy_of
from pysolve.plan import Site, tensor_name

# Most combinations of names that are tried out.
_TRIED = 15


def integers_read(model: nn.Module, batch: Batch, *, trains: bool) -> dict[str, int]:
    """Integers that a network's own modules hold and its code reads while it runs.

    Parameters
    ----------
    model : nn.Module
        Runs as a copy.
    batch : one batch
    trains : bool
        Run it in training mode, too.

    Returns
    -------
    {path of an attribute: int}
    """
    watched, found = copy_of(model), dict[str, int]()
    for name, module in watched.named_modules():
        if isinstance(module, nn.Unflatten):
            module.register_forward_hook(partial(_note_sizes, name, found))
        elif not type(module).__module__.startswith("torch."):
            module.__class__ = _watching(type(module), name, found)
    try:
        for mode in (evaluating, in_training)[: 1 + trains]:
            with mode(watched):
                forward(watched, batch)
    # Code that looks at its own class may refuse to run; then nothing is known.
    except Exception:
        return {}
    return found


def _note_sizes(name: str, found: dict[str, int], module: nn.Unflatten, args: object, output: object) -> None:
    """Note the sizes that a layer brings a dimension into."""
    if type(module.unflattened_size) is tuple:
        sizes = tensor_name(name, "unflattened_size")
        found |= {f"{sizes}.{i}": size for i, size in enumerate(module.unflattened_size)}


def _watching(kind: type[nn.Module], name: str, found: dict[str, int]) -> type[nn.Module]:
    """A subclass that notes which integers of its instances are read."""

    def read(self: nn.Module, leaf: str) -> object:
        value = kind.__getattribute__(self, leaf)
        if type(value) is int and leaf in kind.__getattribute__(self, "__dict__"):
            found[tensor_name(name, leaf)] = value
        return value

    return type(kind.__name__, (kind,), {"__getattribute__": read})


def counting(site: Site, read: Mapping[str, int]) -> dict[str, int]:
    """Integers that may count a site's channels, and how much of them one channel is.

    They are in modules that hold members of the site, up to the one that holds all, or in ``Unflatten``
    there; and they equal the site's channels, or the channels that these are in one of the layers or heads.
    """
    members = [name.split(".")[:-1] for name in (*site.writers, *site.passed, *site.readers)]
    shared = len([*takewhile(lambda parts: len({*parts}) == 1, zip(*members, strict=False))])
    owners = {".".join(parts[:n]) for parts in members for n in range(shared, len(parts) + 1)}
    each = {1, *(table.shape[1] for table in chain(site.rows.values(), site.columns.values()))}
    each |= {one.queries.shape[1] // site.channels for one in site.attention}
    sizes = {site.channels * one: one for one in each}
    return {
        path: sizes[value]
        for path, value in read.items()
        if value in sizes and value > 1 and _owner(path) in owners
    }


def _owner(path: str) -> str:
    """The module of an attribute, or the one that holds the layer of a size."""
    *owner, leaf = path.split(".")
    return ".".join(owner[:-2] if leaf.isdigit() else owner)


def choices(names: set[str]) -> Iterator[set[str]]:
    """Names of integers that may follow a cut, in the order in which to try them: many first."""
    ordered = sorted(names)
    subsets = chain.from_iterable(combinations(ordered, n) for n in range(len(ordered), 0, -1))
    for _, subset in zip(range(_TRIED), subsets, strict=False):
        yield set(subset)

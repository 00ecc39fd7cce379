"""Networks left as they are: copies of their own, and what running them writes put back."""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from itertools import chain
from operator import is_
from types import NoneType, SimpleNamespace
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pysolve.errors import PysolveError
from pysolve.nn.overrides import Args, Function, Kwargs, Overriding

M = TypeVar("M", bound=nn.Module)
# What takes the place of parts of a copy, by their identity, as ``copy.deepcopy`` has it.
Memo: TypeAlias = dict[int, Any]
_Container: TypeAlias = dict[Any, object] | list[object] | deque[object] | set[object]
_CONTAINERS = frozenset((dict, OrderedDict, defaultdict, list, deque, set))
# Most of what modules hold, and nothing that a call could write into.
_VALUES = frozenset((NoneType, bool, int, float, str))


def copy_of(module: M, memo: Memo | None = None) -> M:
    """A copy of a network or a layer, in which tensors that a call with gradients left have no graph.

    Parameters
    ----------
    module : nn.Module
    memo : Memo, optional

    Raises
    ------
    PysolveError
        A part of it has no copies.
    """
    try:
        known = _simple_parts(module, {} if memo is None else memo)
        with _WithoutGraph():
            return copy.deepcopy(module, known)
    # Whatever the parts of a user's network raise.
    except Exception as error:
        what = next(iter(str(error).splitlines()), repr(error)).rstrip(".")
        raise PysolveError(
            f"{type(module).__name__} cannot be copied: {what}. Set to None, or take off as a hook, what has "
            "no copies: locks, open files, generators, trainers."
        ) from error


def _simple_parts(module: nn.Module, memo: Memo) -> Memo:
    """``memo`` with what most of a network is: tensors, and a dozen empty containers a module.

    ``copy.deepcopy`` takes several times as long for these, most of all where it is watched.
    """
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_leaf:
            copy.deepcopy(tensor, memo)
    for part in module.modules():
        for value in vars(part).values():
            if type(value) in _CONTAINERS and not value:
                memo.setdefault(id(value), value.copy())
    return memo


def without_values(module: M) -> M:
    """A copy of a network or a layer on the meta device."""
    memo: Memo = {}
    for tensor in chain(module.parameters(), module.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
    return copy_of(module, memo)


def with_values(module: M) -> M:
    """A copy of a network or a layer with memory for tensors that have none."""
    memo: Memo = {}
    for tensor in chain(module.parameters(), module.buffers()):
        if tensor.is_meta:
            new = torch.empty_like(tensor, device="cpu")
            memo[id(tensor)] = (
                nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
            )
    return copy_of(module, memo)


@contextmanager
def keeping_state(*models: nn.Module) -> Iterator[None]:
    """Put back afterwards what networks write into their own tensors and attributes.

    Of weights the values are kept where a module has a ``max_norm``, to which it rescales them.
    """
    modules = dict.fromkeys(module for model in models for module in model.modules())
    # Layers of this package keep what they have prepared from call to call.
    foreign = [module for module in modules if not type(module).__module__.startswith("pysolve.")]
    seen: set[int] = set()
    kept = [_Kept.of(vars(module), seen) for module in foreign]
    try:
        yield
    finally:
        for one in kept:
            one.put_back()


def all_names(model: nn.Module, tensor: str) -> list[str]:
    """State-dict names of a tensor, its own first and then those under which others share it."""
    state = model.state_dict(keep_vars=True)
    own = state.get(tensor)
    return [tensor, *(name for name, one in state.items() if one is own and name != tensor)]


def untie(model: M, names: Iterable[str]) -> M:
    """Give tensors that share the values of others their own, in place."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        layer = dict(model.named_modules(remove_duplicate=False)).get(owner)
        old = None if layer is None else layer._parameters.get(leaf)
        if layer is None or old is None:
            raise PysolveError(f"{type(model).__name__} has no parameter {name!r} to untie.")
        setattr(layer, leaf, nn.Parameter(old.detach().clone(), old.requires_grad))
        config = vars(model).get("config")
        if config is not None and getattr(config, "tie_word_embeddings", False):
            # Otherwise transformers ties them again when it saves or loads.
            vars(model)["config"] = config = copy.copy(config)
            config.tie_word_embeddings = False
    return model


def drop_graphs(model: nn.Module) -> None:
    """Take the graph off tensors that the last call with gradients left in a network; in place."""
    seen: set[int] = set()
    for module in model.modules():
        vars(module).update({name: _without_graph(value, seen) for name, value in vars(module).items()})


def version(tensor: Tensor) -> int:
    """How often a tensor was written; -1 where torch does not count."""
    return -1 if tensor.is_inference() else tensor._version


class _WithoutGraph(Overriding):
    """Results of operators have copies, too, which torch refuses."""

    def call(self, func: Function, args: Args, kwargs: Kwargs) -> object:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[0].detach().clone()
        return func(*args, **kwargs)


@dataclass(frozen=True, eq=False)
class _Kept:
    """A container, what was in it, and the values of its tensors.

    Parameters
    ----------
    container, items : dict, list, deque or set
        And a shallow copy of it.
    values : list of (tensor, copy, how often it was written)
    weights : list of (parameter, its memory, copy or None)
    inner : list of _Kept
        Containers in it.
    empty : list of dict, list, deque or set
        Those with nothing in them, which most of a module's are.
    """

    container: _Container
    items: _Container
    values: list[tuple[Tensor, Tensor, int]]
    weights: list[tuple[nn.Parameter, Tensor, Tensor | None]]
    inner: list[_Kept]
    empty: list[_Container]

    @classmethod
    def of(cls, container: _Container, seen: set[int], *, rescales: bool = False) -> _Kept:
        """A container as it is; weights without their values, unless the module ``rescales`` them."""
        seen.add(id(container))
        kept = cls(container, container.copy(), [], [], [], [])
        rescales = rescales or (isinstance(container, dict) and container.get("max_norm") is not None)
        for one in _parts(kept.items):
            kind = type(one)
            if kind in _VALUES:
                continue
            if isinstance(one, nn.Parameter):
                if one.layout is torch.strided and not is_lazy(one):
                    kept.weights.append((one, one.detach(), one.detach().clone() if rescales else None))
            elif kind not in _CONTAINERS and isinstance(one, Tensor):
                kept.values.append((one, one.detach().clone(), version(one)))
            elif (inside := _inside(one)) is not None and id(inside) not in seen:
                if inside:
                    kept.inner.append(cls.of(inside, seen, rescales=rescales))
                else:
                    seen.add(id(inside))
                    kept.empty.append(inside)
        return kept

    def put_back(self) -> None:
        """The same things in the container, with the same values."""
        for tensor, value, count in self.values:
            if count != version(tensor) or count < 0:
                tensor.detach().copy_(value)
        for weight, memory, before in self.weights:
            if not weight.is_set_to(memory):
                weight.data = memory
            if before is not None and not torch.equal(memory, before):
                memory.copy_(before)
        for one in self.inner:
            one.put_back()
        for empty in self.empty:
            if empty:
                empty.clear()
        container, items = self.container, self.items
        if not (_same(container, items) and _same(_parts(container), _parts(items))):
            container.clear()
            if isinstance(container, list | deque):
                container.extend(items)
            elif isinstance(container, set):
                container.update(items)
            else:
                container.update(cast("dict[object, object]", items))


def _inside(value: object) -> _Container | None:
    """The container that a value is, or that holds its attributes; None where it is something else."""
    if type(value) in _CONTAINERS:
        return cast(_Container, value)
    if isinstance(value, SimpleNamespace) or (is_dataclass(value) and not isinstance(value, type)):
        return cast("_Container | None", getattr(value, "__dict__", None))
    return None


def _parts(container: _Container) -> Collection[object]:
    return container.values() if isinstance(container, dict) else container


def _same(some: Collection[object], others: Collection[object]) -> bool:
    """Whether both hold the same objects in the same order."""
    return len(some) == len(others) and all(map(is_, some, others))


def _without_graph(value: object, seen: set[int]) -> object:
    """A tensor without its graph; containers with such tensors in them, in place."""
    if isinstance(value, Tensor):
        return value if value.is_leaf else value.detach()
    if type(value) is tuple:
        return tuple(_without_graph(one, seen) for one in value)
    if type(value) in _CONTAINERS and id(value) not in seen:
        seen.add(id(value))
        if isinstance(value, dict):
            value.update({key: _without_graph(one, seen) for key, one in value.items()})
        elif isinstance(value, list):
            value[:] = [_without_graph(one, seen) for one in value]
    return value

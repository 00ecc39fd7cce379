"""Finding a network's layers, and running the network on data without changing either."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from pysolve.correlations import AnyArray
from pysolve.errors import DataError, LayerNotFoundError
from pysolve.nn.overrides import Args, Kwargs
from pysolve.nn.state import keeping_state

# A batch of a user's loader, and a network's output: tensors, tuples and lists, or mappings.
Batch = Any
Output = Any
Device = torch.device | str | int | None
# What ``ignore=`` takes: names of layers, patterns "re:…" that match whole names, types, layers themselves.
Ignored = str | type[nn.Module] | nn.Module
Values = Tensor | AnyArray
NO_BATCHES = "there are no batches: expected at least one. Was a generator used up before?"


def check_model(name: str, model: object) -> None:
    """Refuse what is no network, such as a result."""
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise TypeError(f"{name} must be a torch.nn.Module, such as the model of a Compressed; got {kind}.")


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer that ``model.named_modules()`` calls ``name``; an unknown name brings up the close ones."""
    layer = layer_at(model, name)
    if layer is not None:
        return layer
    names = [known for known, _ in model.named_modules(remove_duplicate=False)]
    meant = closest(name, names, "see model.named_modules().")
    raise LayerNotFoundError(f"{type(model).__name__} has no layer {name!r}: {meant}")


def layer_at(model: nn.Module, name: str) -> nn.Module | None:
    """The same, or None; a layer shared under several names answers to each of them.

    Listing all modules for each of hundreds of names takes longer than what is done with them.
    """
    layer: nn.Module | None = model
    for part in name.split(".") if name else ():
        layer = None if layer is None or part not in layer._modules else layer._modules[part]
    return layer


def closest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Which of the known names may have been meant."""
    close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else otherwise


def find_matching(model: nn.Module, ignore: Iterable[Ignored]) -> set[str]:
    """Names of the layers that names, patterns ``re:…``, types or layers stand for, with what they hold."""
    if isinstance(ignore, str | type | nn.Module) or not isinstance(ignore, Iterable):
        remedy = "leave it out" if ignore is None else f"pass [{ignore!r}]"
        raise TypeError(f"ignore must be a sequence of names, types or layers, got {ignore!r}: {remedy}.")
    first = {module: name for name, module in model.named_modules()}
    matches = [part for one in ignore for layer in _matching(model, one) for part in layer.modules()]
    return {first[layer] for layer in matches}


def _matching(model: nn.Module, one: Ignored) -> list[nn.Module]:
    """Layers that an entry of ``ignore`` stands for."""
    if isinstance(one, str) and not one.startswith("re:"):
        return [find_layer(model, one)]
    modules: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if len(modules) > 1:
        # Patterns and types are of layers: the network itself would be all of them.
        modules.pop("")
    if isinstance(one, str):
        try:
            found = [module for name, module in modules.items() if re.fullmatch(one[3:], name)]
        except re.error as error:
            raise ValueError(f"{one!r} in ignore is no regular expression: {error}.") from error
        what = f"matches {one!r}: patterns match whole names"
    elif isinstance(one, type):
        found = [module for module in modules.values() if isinstance(module, one)]
        what = f"is a {one.__name__}"
    else:
        found = [module for module in modules.values() if module is one]
        what = f"is this {type(one).__name__}: ignore takes names, patterns 're:…', types, and its layers"
    if not found:
        raise LayerNotFoundError(f"{type(model).__name__} has no layer that {what}.")
    return found


@contextmanager
def keeping_modes(*models: nn.Module) -> Iterator[None]:
    """Restore the training or evaluation mode of every submodule afterwards, whatever happens."""
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def evaluating(*models: nn.Module, as_used: bool = False) -> Iterator[None]:
    """Evaluation mode without gradients and caches; modes, and what calls write into networks, come back.

    Every layer is called, unless networks are to run ``as_used``.
    """
    calls = nullcontext() if as_used else calling_layers()
    with (
        keeping_modes(*models),
        keeping_state(*models),
        _without_caches(*models),
        torch.no_grad(),
        calls,
    ):
        for model in models:
            model.eval()
            for module in model.modules():
                # By ``module.compile()``, in which hooks may be passed by; put back with the rest.
                if getattr(module, "_compiled_call_impl", None) is not None:
                    module._compiled_call_impl = None
        yield


@contextmanager
def calling_layers() -> Iterator[None]:
    """Torch's encoder layers call their layers, instead of one kernel for all of them.

    That kernel gives zeros where a mask says that there is nothing, and hands nested tensors to hooks.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _without_caches(*models: nn.Module) -> Iterator[None]:
    """Hugging Face's decoders return keys and values for the next call: they run without here.

    Encoder, decoder and the whole may each hold a configuration of their own.
    """
    configs = [getattr(module, "config", None) for model in models for module in model.modules()]
    caching = [
        (one, one.use_cache) for one in configs if one is not None and getattr(one, "use_cache", False)
    ]
    try:
        for one, _ in caching:
            one.use_cache = False
        yield
    finally:
        for one, before in reversed(caching):
            one.use_cache = before


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Hooks that are removed afterwards; they may be registered while they are listed."""
    with ExitStack() as stack:
        for handle in handles:
            stack.enter_context(handle)
        yield


@contextmanager
def same_draws(model: nn.Module, seed: int = 0) -> Iterator[None]:
    """Random numbers inside that start from one state every time; the state outside is restored."""
    home = device_of(model)
    with torch.random.fork_rng(devices=[home] if home.type == "cuda" else []):
        # torch.manual_seed also writes down, for every kind of device that has not run yet, where it was
        # called from: that takes longer than a small network.
        (torch.default_generator.manual_seed if home.type == "cpu" else torch.manual_seed)(seed)
        yield


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Training mode without gradients; modes, what calls write, and random numbers' state come back."""
    with (
        keeping_modes(model),
        keeping_state(model),
        _without_caches(model),
        same_draws(model),
        torch.no_grad(),
    ):
        model.train()
        yield


def forward(model: nn.Module, batch: Batch, device: Device = None) -> Output:
    """The network's output for one batch, which is copied so that in-place layers cannot change it.

    ``device`` is where to move the batch; by default it must be on one of the network's devices already.
    """
    args, kwargs = prepared(model, batch, device)
    return model(*args, **kwargs)


def prepared(model: nn.Module, batch: Batch, device: Device = None) -> tuple[Args, Kwargs]:
    """Positional and keyword arguments of the network, with copies of all tensors, on its device."""
    args, kwargs = pytree.tree_map_only(
        Tensor, lambda value: value.detach().to(device=device, copy=True), arguments(batch)
    )
    _check_devices(
        model, [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)], device
    )
    return args, kwargs


def arguments(batch: Batch) -> tuple[Args, Kwargs]:
    """Positional and keyword arguments of the network for one batch.

    A tuple's or list's first item is the input (the rest, such as labels, is ignored); a mapping holds
    keyword arguments.
    """
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise TypeError(
        "a batch must be a tensor, a tuple or list whose first item is the input, or a mapping of keyword "
        f"arguments, got {type(batch).__name__}{_remedy(batch)}."
    )


def _remedy(batch: object) -> str:
    if isinstance(batch, np.ndarray | np.generic):
        return ": torch.from_numpy makes a tensor of an array"
    if isinstance(batch, tuple | list):
        return (
            ": give several inputs by name, {'first': …, 'second': …}, with the names that forward gives them"
        )
    return ""


class Inputs(dict[str, object]):
    """Keyword arguments of a network of which some tensors are the same for all samples.

    ``shared`` are the numbers of these among all leaves, in order; where they are all of them, the batch is
    one sample that cannot be divided, such as a graph.
    """

    def __init__(self, arguments: Mapping[str, object], shared: Iterable[int]) -> None:
        super().__init__(arguments)
        self.shared = frozenset(shared)


# So that what goes through all tensors of a value finds those of batches.
pytree.register_pytree_node(
    Inputs,
    lambda batch: ([dict(batch)], batch.shared),
    lambda parts, shared: Inputs(next(iter(parts)), shared),
)


def sample_leaves(batch: Batch) -> dict[int, Tensor]:
    """The tensors of a batch whose first dimension is the samples, by their number among all leaves."""
    shared = batch.shared if isinstance(batch, Inputs) else ()
    leaves = [*enumerate(pytree.tree_leaves(arguments(batch)))]
    for _, leaf in leaves:
        if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout is not torch.strided):
            kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
            remedy = (
                "padded samples, with a mask" if leaf.is_nested else "its to_dense(), or make it a buffer"
            )
            raise TypeError(
                f"a batch holds a {kind} tensor, which is not taken apart or traced: give {remedy}."
            )
    return {i: leaf for i, leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim > 0 and i not in shared}


def with_leaves(batch: Batch, new: Mapping[int, Tensor]) -> Batch:
    """A batch in the same form with other tensors in some places; never with labels."""
    leaves, form = pytree.tree_flatten(arguments(batch))
    args, kwargs = pytree.tree_unflatten([new.get(i, leaf) for i, leaf in enumerate(leaves)], form)
    if isinstance(batch, Inputs):
        return Inputs(kwargs, batch.shared)
    return kwargs if kwargs else args[0]


def few_samples(batch: Batch, count: int = 2) -> Batch:
    """The first samples of a batch, or the batch itself where its tensors do not share a longer dimension."""
    leaves = sample_leaves(batch)
    lengths = {len(leaf) for leaf in leaves.values()}
    if len(lengths) != 1 or lengths.pop() <= count:
        return batch
    return with_leaves(batch, {i: leaf[:count] for i, leaf in leaves.items()})


def _check_devices(model: nn.Module, inputs: list[Tensor], device: Device) -> None:
    """Refuse a batch on none of the network's devices."""
    homes, places = set[torch.device](), {value.device for value in inputs}
    for tensor in chain(model.parameters(), model.buffers()):
        homes.add(tensor.device)
        # Mostly the first one tells.
        if places <= homes:
            return
    strangers = {str(place) for place in places - homes}
    if not homes or not strangers:
        return
    network, data = ", ".join(sorted(map(str, homes))), ", ".join(sorted(strangers))
    remedy = f"pass device={str(min(homes, key=str))!r}" if device is None else "move the network there first"
    raise ValueError(f"the batch is on {data}, but the network is on {network}: {remedy}.")


def as_tensor(values: Values) -> Tensor:
    """A tensor that shares an array's memory where torch allows it, and copies where not."""
    if isinstance(values, Tensor):
        return values
    array = np.ascontiguousarray(values)
    if array.dtype.kind not in "biufc":
        raise TypeError(
            f"expected an array or a tensor of numbers, got {array.dtype} of shape {array.shape}."
        )
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def as_array(tensor: Tensor) -> AnyArray:
    """The tensor's values as an array; bfloat16, which NumPy lacks, as float32."""
    values = tensor.detach().cpu()
    return np.asarray(values.float() if values.dtype == torch.bfloat16 else values)


def as_input(model: nn.Module, x: Values) -> Tensor:
    """Floating-point inputs in the network's data type; others as they are."""
    inputs = as_tensor(x)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), inputs.dtype)
    return inputs.to(dtype) if inputs.is_floating_point() else inputs


def labelled(model: nn.Module, x: Values, y: Values) -> tuple[Tensor, Tensor]:
    """Inputs for the network and their labels; DataError where they differ in number or are none."""
    check_model("model", model)
    inputs, labels = as_input(model, x), as_tensor(y)
    if not len(inputs) or len(labels) != len(inputs):
        raise DataError(f"expected one label for each input, got {len(labels)} for {len(inputs)} inputs.")
    return inputs, labels


def checked_device(device: Device, *, computes: bool = True) -> torch.device | None:
    """A device, if one is given, that ``computes``: the meta device does not.

    Raises
    ------
    ValueError
        There is no such device, or it does not compute.
    """
    if device is None:
        return None
    try:
        found = torch.ones(1, device=device)
        if computes:
            found.item()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ValueError(f"cannot compute on {device!r}: {reason}.") from error
    return found.device


def device_of(model: nn.Module) -> torch.device:
    """Device of the network's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))

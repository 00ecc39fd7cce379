"""Finding a network's layers, and running the network on data without changing either."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve.correlations import AnyArray
from pysolve.errors import DataError, LayerNotFoundError

# A batch of a user's loader, and a network's output: tensors, tuples and lists, or mappings.
Batch = Any
Output = Any
Device = torch.device | str | int | None
Values = Tensor | AnyArray
NO_BATCHES = "there are no batches: expected at least one. Was a generator used up before?"


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer that ``model.named_modules()`` calls ``name``; an unknown name brings up the close ones."""
    # A layer shared under several names answers to each of them.
    layers: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if name in layers:
        return layers[name]
    close = difflib.get_close_matches(name, layers, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()."
    raise LayerNotFoundError(f"{type(model).__name__} has no layer {name!r}: {hint}")


def find_matching(model: nn.Module, ignore: Iterable[str]) -> set[str]:
    """Names of the layers that names and patterns ``re:…`` match."""
    if isinstance(ignore, str):
        raise TypeError(f"ignore must be a sequence of names, got the string {ignore!r}: pass [{ignore!r}].")
    first = {module: name for name, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    found: set[str] = set()
    for name in ignore:
        if name.startswith("re:"):
            matches = [first[modules[one]] for one in modules if re.fullmatch(name[3:], one)]
            if not matches:
                raise LayerNotFoundError(
                    f"{type(model).__name__} has no layer that matches {name!r}: patterns match whole names."
                )
            found.update(matches)
        else:
            found.add(first[find_layer(model, name)])
    return found


def devices(model: nn.Module) -> set[torch.device]:
    """Devices of the network's parameters and buffers."""
    return {tensor.device for tensor in chain(model.parameters(), model.buffers())}


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
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes are restored afterwards."""
    with keeping_modes(*models), torch.no_grad():
        for model in models:
            model.eval()
        yield


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Training mode without gradients; modes and the state of random numbers are restored afterwards."""
    cards = [device for device in devices(model) if device.type == "cuda"]
    with keeping_modes(model), torch.no_grad(), torch.random.fork_rng(cards):
        model.train()
        yield


def forward(model: nn.Module, batch: Batch, device: Device = None) -> Output:
    """The network's output for one batch, which is copied so that in-place layers cannot change it.

    Parameters
    ----------
    model : nn.Module
    batch : tensor, tuple or list, or mapping
        A tuple's or list's first item is the input (the rest, such as labels, is ignored); a mapping holds
        keyword arguments.
    device : torch.device, optional
        Where to move the batch; by default it must be on one of the network's devices already.
    """
    args, kwargs = arguments(batch)
    args = tuple(_fresh(value, device) for value in args)
    kwargs = {name: _fresh(value, device) for name, value in kwargs.items()}
    _check_devices(model, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)], device)
    return model(*args, **kwargs)


def without_classes(output: Output) -> Output:
    """A network's output with mappings in the place of dataclasses, which torch does not look into."""
    if isinstance(output, tuple | list):
        return [*map(without_classes, output)]
    if not isinstance(output, Mapping) and is_dataclass(output) and not isinstance(output, type):
        output = {field.name: getattr(output, field.name) for field in fields(output)}
    return (
        {key: without_classes(one) for key, one in output.items()} if isinstance(output, Mapping) else output
    )


def arguments(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of the network for one batch."""
    if isinstance(batch, tuple | list) and batch:
        batch = batch[0]
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    raise TypeError(
        f"a batch must be a tensor, a tuple or list whose first item is the input, or a mapping of keyword "
        f"arguments, got {type(batch).__name__}."
    )


def few_samples(batch: Batch, count: int = 2) -> Batch:
    """The first samples of a batch, enough to see what a network does; the batch itself where it has no more.

    A batch whose tensors do not share their first dimension is left as it is.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(arguments(batch)) if isinstance(leaf, Tensor)]
    lengths = {len(tensor) if tensor.ndim else 0 for tensor in tensors}
    if len(lengths) != 1 or lengths.pop() <= count:
        return batch
    args, kwargs = pytree.tree_map_only(Tensor, lambda leaf: leaf[:count], arguments(batch))
    return kwargs if kwargs else args


def check_batches(batches: object) -> None:
    """Refuse a single batch where an iterable of batches is expected."""
    if isinstance(batches, Tensor | Mapping):
        kind = type(batches).__name__
        raise TypeError(f"batches must be an iterable of batches, got one {kind}: wrap it in a list.")


def _fresh(value: object, device: Device) -> object:
    """A copy of a tensor, on ``device`` if one is given; anything else as it is."""
    return value.detach().to(device=device, copy=True) if isinstance(value, Tensor) else value


def _check_devices(model: nn.Module, inputs: list[Tensor], device: Device) -> None:
    """Refuse a batch on none of the network's devices."""
    homes = devices(model)
    strangers = {str(value.device) for value in inputs if value.device not in homes}
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
    """Inputs for the network and their labels, checked to be as many and not none.

    Parameters
    ----------
    model : nn.Module
    x, y : (n, …) arrays or tensors

    Raises
    ------
    DataError
        When they differ in number or are none.
    """
    inputs, labels = as_input(model, x), as_tensor(y)
    if not len(inputs) or len(labels) != len(inputs):
        raise DataError(f"expected one label for each input, got {len(labels)} for {len(inputs)} inputs.")
    return inputs, labels


def device_of(model: nn.Module) -> torch.device:
    """Device of the network's first parameter."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))

"""What a network's output holds, whatever its structure."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from pysolve.nn.running import Output


def tensors_of(output: Output) -> list[Tensor]:
    """All tensors of an output in order, of mappings, sequences, dataclasses, distributions and the like."""
    return _tensors(output, set())


def floating(output: Output) -> list[Tensor]:
    """The compared tensors of a network's output: its logits, or all that are floating-point."""
    if isinstance(output, Mapping):
        return floating(output["logits"] if "logits" in output else [*output.values()])
    if isinstance(output, tuple | list):
        return [tensor for item in output for tensor in floating(item)]
    if not isinstance(output, Tensor):
        chosen = logits_of(output)
        # Caches of keys and values are no answer.
        known = chosen is not output or dataclasses.is_dataclass(output) or isinstance(output, Distribution)
        return floating(tensors_of(chosen)) if known else []
    # Single numbers are losses and counts.
    return [output] if output.is_floating_point() and output.ndim and _is_dense(output) else []


def main_output(output: Output) -> Tensor:
    """The main tensor of a network's output: its logits, or the first one that is floating-point."""
    found = floating(output) or tensors_of(logits_of(output))
    if not found:
        raise TypeError(f"expected a tensor in the network's output, got {type(output).__name__}.")
    if not _is_dense(found[0]):
        kind = "nested" if found[0].is_nested else str(found[0].layout).removeprefix("torch.")
        raise TypeError(f"expected a dense tensor in the network's output, got a {kind} one: make it dense.")
    return found[0]


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def logits_of(output: Output) -> Output:
    """What an output calls its ``logits``; the output itself where it has none."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    if isinstance(output, Tensor | tuple | list):
        return output
    return getattr(output, "logits", output)


def with_tensors(output: Output, tensors: Sequence[Tensor]) -> Output:
    """A copy of a structured output with other tensors."""
    own = tensors_of(output)
    return copy.deepcopy(output, {id(old): new for old, new in zip(own, tensors, strict=True)})


def _tensors(value: object, seen: set[int]) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if id(value) in seen:
        return []
    seen.add(id(value))
    return [tensor for part in _parts(value) for tensor in _tensors(part, seen)]


def _parts(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return [*value.values()]
    if isinstance(value, tuple | list):
        return [*value]
    if isinstance(value, nn.Module | type) or callable(value) or _inside_torch(value):
        return []
    if dataclasses.is_dataclass(value):
        return [getattr(value, field.name) for field in dataclasses.fields(value)]
    return [*getattr(value, "__dict__", {}).values()]


def _inside_torch(value: object) -> bool:
    """Sizes that a trace leaves free, for one, hold the whole trace."""
    home = type(value).__module__
    return home.partition(".")[0] == "torch" and not home.startswith("torch.distributions.")

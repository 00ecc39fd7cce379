"""Networks of transformers without the layers that add nothing any more, and their configurations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pysolve.nn.layers.idle import Constant
from pysolve.nn.pretrained.stock import (
    NotStockError,
    PretrainedConfig,
    PretrainedModel,
    shapes_of,
    skeleton,
    with_fields,
)
from pysolve.nn.state import copy_of


def without_idle_layers(network: PretrainedModel) -> PretrainedModel:
    """The network without those of its layers all of whose branches are gone; itself where there are none.

    Those behind get their numbers. What a layer left of its branches, a constant, is added to the bias of the
    last layer in front that writes to the stream in the same place.

    Returns
    -------
    nn.Module
        A copy, with the same tensors, whose configuration says how many layers there are.

    Raises
    ------
    NotStockError
        A constant has no place; no fields of the configuration describe what is left.
    """
    idle = {
        name: [i for i, layer in enumerate(module) if _is_idle(layer)]
        for name, module in network.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    idle = {name: gone for name, gone in idle.items() if gone}
    if not idle:
        return network
    tensors = [*network.parameters(), *network.buffers()]
    shorter: PretrainedModel = copy_of(network, {id(one): one for one in tensors})
    shorter.config = network.config
    for name, gone in idle.items():
        layers: nn.ModuleList = shorter.get_submodule(name)
        count = len(layers)
        if len(gone) == count:
            raise NotStockError(f"no layer of {name} is left")
        for i in gone:
            _move_constants(layers, name, i, gone)
        left: list[PretrainedModel] = [layers[i] for i in range(count) if i not in gone]
        while len(layers):
            layers.pop(-1)
        layers.extend(left)
        for number, layer in enumerate(left):
            for module in layer.modules():
                if type(getattr(module, "layer_idx", None)) is int:
                    module.layer_idx = number
        shorter.config = _configuration(shorter, name, count, gone)
    return shorter


def partly_idle(network: nn.Module) -> str | None:
    """The first layer of a list of which one branch is gone, and not all of them."""
    lists = ((name, one) for name, one in network.named_modules() if isinstance(one, nn.ModuleList))
    layers = ((f"{name}.{i}", layer) for name, one in lists for i, layer in enumerate(one))
    return next((name for name, one in layers if constants_of(one) and not _is_idle(one)), None)


def constants_of(layer: nn.Module) -> dict[str, Constant]:
    """What is left of branches inside of a layer."""
    return {name: one for name, one in layer.named_modules() if isinstance(one, Constant)}


def _is_idle(layer: nn.Module) -> bool:
    """Whether nothing in a layer computes but constants that it adds."""
    constants = {id(one.bias) for one in constants_of(layer).values()}
    return bool(constants) and all(id(one) in constants for one in layer.state_dict(keep_vars=True).values())


def _move_constants(layers: nn.ModuleList, name: str, gone: int, idle: Sequence[int]) -> None:
    """Add what a layer leaves of its branches to the bias of the nearest layer in front."""
    constants = {path: one for path, one in constants_of(layers[gone]).items() if one.bias.detach().any()}
    if not constants:
        return
    total = torch.stack([one.bias.detach() for one in constants.values()]).sum(0)
    before = next((i for i in range(gone - 1, -1, -1) if i not in idle), None)
    if before is None:
        raise NotStockError(
            f"{name}.{gone} is gone and leaves a constant, with no layer in front to add it: compress with "
            'widths="uniform" and keep={…: 0}, which leave none'
        )
    writer = cast(nn.Linear, layers[before].get_submodule([*constants][-1]))
    own: Tensor | None = writer.bias
    trained = writer.weight.requires_grad if own is None else own.requires_grad
    writer.bias = nn.Parameter(total if own is None else own.detach() + total, trained)


def _configuration(shorter: PretrainedModel, name: str, count: int, gone: Sequence[int]) -> PretrainedConfig:
    """The configuration that gives a list of layers fewer of them, each of the kind that it is."""
    config = shorter.config
    for changes in _changes(config.to_dict(), count, gone):
        try:
            other = with_fields(config, changes)
            made = skeleton(type(shorter), other)
        # Whatever checks of configurations raise.
        except Exception:
            continue
        if _are_alike(made, shorter, name):
            return other
    raise NotStockError(
        f"no fields of {type(config).__name__} describe {name} without {', '.join(map(str, gone))} of its "
        f"{count} layers"
    )


def _changes(
    record: Mapping[str, object], count: int, gone: Sequence[int], prefix: str = ""
) -> Iterator[dict[str, object]]:
    """What fields may become: one that counts layers, lists of these, and a number that is one of them."""
    left = [i for i in range(count) if i not in gone]
    lists = {
        f"{prefix}{field}": [value[i] for i in left]
        if len(value) == count
        else [left.index(i) for i in value if i in left]
        for field, value in record.items()
        if isinstance(value, list) and _is_of_layers(field, value, count)
    }
    numbers = {field: value for field, value in record.items() if type(value) is int}
    for field in [one for one, value in numbers.items() if value == count]:
        changes: dict[str, object] = {f"{prefix}{field}": len(left), **lists}
        yield changes
        # Up to which layer they are of another kind.
        for other, value in numbers.items():
            if other != field and 0 < value <= count:
                yield {**changes, f"{prefix}{other}": sum(i < value for i in left)}
    for field, part in record.items():
        if isinstance(part, dict):
            yield from _changes(part, count, gone, f"{prefix}{field}.")


def _is_of_layers(field: str, value: Sequence[object], count: int) -> bool:
    """Whether a list has an entry for each layer, or numbers of layers."""
    numbers = all(type(one) is int and 0 <= one < count for one in value) and len({*value}) == len(value)
    return len(value) == count or (bool(value) and numbers and "layer" in field)


def _are_alike(made: nn.Module, shorter: nn.Module, name: str) -> bool:
    """Whether layers of two networks have the same tensors but for biases, and say the same beside sizes.

    Layers with a branch that is gone are left aside.
    """
    partly = [path for path, one in _layers(shorter, name) if constants_of(one)]
    if [path for path, _ in _layers(made, name)] != [path for path, _ in _layers(shorter, name)]:
        return False
    names, said = list[set[str]](), list[dict[str, object]]()
    for network in (made, shorter):
        whole = [(path, one) for path, one in _layers(network, name) if path not in partly]
        tensors = {f"{path}.{tensor}" for path, layer in whole for tensor in shapes_of(layer)}
        names.append({one for one in tensors if not one.endswith(".bias")})
        said.append({key: one for path, layer in whole for key, one in _said(path, layer)})
    return names[0] == names[1] and all(
        said[0][one] == said[1][one] for one in said[0].keys() & said[1].keys()
    )


def _layers(network: nn.Module, name: str) -> list[tuple[str, nn.Module]]:
    return [(f"{name}.{leaf}", one) for leaf, one in network.get_submodule(name).named_children()]


def _said(path: str, layer: nn.Module) -> Iterator[tuple[str, object]]:
    """What modules hold beside tensors; of numbers, which are sizes as well, only that they are."""
    for inner, module in layer.named_modules():
        for leaf, value in vars(module).items():
            if leaf != "training" and leaf[0] != "_" and (value is None or isinstance(value, str | int)):
                one = value if isinstance(value, str | bool) else type(value)
                yield f"{path}.{inner}.{leaf}", one

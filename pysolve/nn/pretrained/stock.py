"""The configuration of transformers that describes a cut network, read back from the network's own shapes."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from pysolve.errors import PysolveError

# A network of transformers, or a part of one, and its configuration: of a library that need not be there.
PretrainedModel: TypeAlias = Any
PretrainedConfig: TypeAlias = Any
# A size of a tensor: its state-dict name, and which of its dimensions.
Size = tuple[str, int]
Shapes = Mapping[str, tuple[int, ...]]
# Sizes that a field which is not set is tried with.
_TRIED = (8, 16)
# Times that fields are measured anew where their sizes multiply; most assignments that are tried.
_ROUNDS, _LEAVES = 2, 16
_NAMED = 3


@dataclass(frozen=True, eq=False)
class Stock:
    """A configuration, and what it took for the class to describe the network.

    Parameters
    ----------
    config : PretrainedConfig
    changes : {field: int}
        By which it differs from that of ``Fields``.
    zeros : {state-dict name: shape}
        Biases that the class has then, and the network has not.
    """

    config: PretrainedConfig
    changes: Mapping[str, int]
    zeros: Shapes


class NotStockError(PysolveError):
    """A network that no configuration of its class describes."""


def is_pretrained(network: nn.Module) -> bool:
    """Whether a network is one of transformers, which makes such networks from configurations."""
    # By name: asking the library for the class imports much of it.
    bases = ((base.__module__, base.__name__) for base in type(network).__mro__)
    return ("transformers.modeling_utils", "PreTrainedModel") in bases


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's tensors by state-dict name."""
    state = network.state_dict()
    return {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}


def skeleton(kind: type[nn.Module], config: PretrainedConfig) -> nn.Module:
    """A network of a class, without values.

    Raises
    ------
    NotStockError
        The class cannot make one.
    """
    try:
        with torch.device("meta"):
            made: PretrainedModel = kind(copy.deepcopy(config))
            # Not every version ties weights that have no values by itself.
            made.tie_weights()
    # Whatever constructors raise.
    except Exception as error:
        raise NotStockError(f"{kind.__name__} cannot be made without values: {error}") from error
    return made  # type: ignore[no-any-return]


def with_fields(config: PretrainedConfig, changes: Mapping[str, object]) -> PretrainedConfig:
    """A configuration with other fields, if its own checks accept them; ``a.b`` is field b of field a."""
    record = config.to_dict()
    for path, value in changes.items():
        *owner, leaf = path.split(".")
        place = record
        for part in owner:
            place = place[part]
        place[leaf] = value
    return type(config).from_dict(record)


def stock_of(network: nn.Module, shapes: Shapes | None = None) -> Stock:
    """The configuration whose class has this network's tensors, numbers in modules, and ties.

    ``shapes``: of the tensors, if not as they are.

    Raises
    ------
    NotStockError
        There is none: names the fields and the layers that differ.
    """
    kind, shapes = type(network), shapes or shapes_of(network)
    config, zeros = _with_biases(kind, network.config, shapes)
    found = describe(network, {**shapes, **zeros}, fields_of(network, config))
    config = found.config
    own = _tied(skeleton(kind, config))
    if own != _tied(network):
        config = with_fields(config, {"tie_word_embeddings": not own})
        if _tied(skeleton(kind, config)) != _tied(network):
            raise NotStockError("other layers share their weights than those of the class")
    return Stock(with_numbers(network, config), found.changes, zeros)


def describe(network: nn.Module, shapes: Shapes, fields: Fields) -> Stock:
    """The configuration under which a network's class has tensors of these shapes.

    Fields are solved for, and what is found is built to see that it has these shapes. Of several
    configurations, such as half of the heads or heads of half the size, that one whose modules hold the
    network's numbers.

    Raises
    ------
    NotStockError
        There is none.
    """
    kind, found = type(network), [*_solutions(type(network), fields, shapes)]
    told = _told(network, fields)
    if told and _sizes(kind, fields.config, told):
        nearer = _fields(kind, with_fields(fields.config, told))
        found += [{**told, **changes} for changes in _solutions(kind, nearer, shapes)]
    if not found:
        raise NotStockError(_complaint(kind, fields, shapes))
    made = [with_fields(fields.config, changes) for changes in found]
    apart = [len(_numbers_apart(skeleton(kind, one), network)) for one in made]
    best = apart.index(min(apart))
    return Stock(made[best], found[best], {})


@dataclass(frozen=True, eq=False)
class Fields:
    """What a configuration's fields do to a network's sizes.

    Parameters
    ----------
    config : PretrainedConfig
        With every field that a size follows written out.
    values : {field: int}
        As they are, with those that were not set.
    slopes : {field: {size: float}}
        By how much a size grows with the field.
    """

    config: PretrainedConfig
    values: Mapping[str, int]
    slopes: Mapping[str, Mapping[Size, float]]


def fields_of(network: nn.Module, config: PretrainedConfig | None = None) -> Fields:
    """Change each field of a network's configuration to see which sizes follow it, and by how much."""
    return _fields(type(network), network.config if config is None else config)


def _fields(kind: type[nn.Module], config: PretrainedConfig) -> Fields:
    """Every whole number of a configuration, and every field that is not set."""
    base = _sizes(kind, config, {})
    assert base is not None
    values, slopes, explicit = dict[str, int](), dict[str, Mapping[Size, float]](), dict[str, int]()
    for path, value in _leaves(config):
        if value is not None:
            tried = (2 * value, value // 2, value + 1, value - 1)
            made = ((t, _sizes(kind, config, {path: t})) for t in tried if t > 0)
            at, other = next(((t, sizes) for t, sizes in made if sizes), (value, base))
            if grown := _slopes(base, other, at - value):
                values[path], slopes[path] = value, grown
            continue
        first, second = (_sizes(kind, config, {path: t}) for t in _TRIED)
        if first is None or second is None:
            continue
        grown = _slopes(first, second, _TRIED[1] - _TRIED[0])
        amounts = {_TRIED[0] + (base[size] - first[size]) / slope for size, slope in grown.items()}
        if len(amounts) == 1 and (amount := amounts.pop()) == int(amount):
            explicit[path] = int(amount)
    if explicit:
        # Others no longer decide over these: heads over the size of a head, for one.
        return _fields(kind, with_fields(config, explicit))
    return Fields(config, values, slopes)


def _leaves(config: PretrainedConfig, prefix: str = "") -> Iterator[tuple[str, int | None]]:
    """Whole numbers of a configuration and of those in it, and fields that are not set."""
    record = config.to_dict()
    for name, value in record.items():
        inner = getattr(config, name, None)
        if isinstance(value, dict) and hasattr(inner, "to_dict"):
            yield from _leaves(inner, f"{prefix}{name}.")
        elif value is None or (type(value) is int and value > 0):
            yield f"{prefix}{name}", value
    # Read by classes whose configurations do not list it: by default it follows from other widths.
    if "head_dim" not in {*record, *config.attribute_map}:
        yield f"{prefix}head_dim", None


def _sizes(
    kind: type[nn.Module], config: PretrainedConfig, changes: Mapping[str, int]
) -> dict[Size, int] | None:
    """Sizes of the tensors with some fields changed; None where there is no such network, or other names."""
    try:
        network = skeleton(kind, with_fields(config, changes) if changes else config)
    # Whatever checks of configurations and constructors raise.
    except Exception:
        return None
    return _flat(shapes_of(network))


def _flat(shapes: Shapes) -> dict[Size, int]:
    return {(name, i): size for name, shape in shapes.items() for i, size in enumerate(shape)}


def _slopes(base: Mapping[Size, int], other: Mapping[Size, int], step: int) -> dict[Size, float]:
    """By how much each size grows; nothing where there are other tensors."""
    if base.keys() != other.keys():
        return {}
    return {size: (other[size] - base[size]) / step for size in base if other[size] != base[size]}


def _solutions(
    kind: type[nn.Module], fields: Fields, wanted: Shapes, rounds: int = _ROUNDS
) -> Iterator[dict[str, int]]:
    """Changes of fields with which the class has exactly these shapes."""
    now, sizes = _sizes(kind, fields.config, {}), _flat(wanted)
    if now is None or now.keys() != sizes.keys():
        return
    for number, changes in enumerate(_assignments(now, fields, sizes, {})):
        if number == _LEAVES:
            return
        made = _sizes(kind, fields.config, changes)
        if made == sizes:
            yield changes
        elif made is not None and changes and rounds:
            # Sizes that two fields multiply to, such as heads of another size, and fewer of them.
            nearer = _fields(kind, with_fields(fields.config, changes))
            yield from ({**changes, **more} for more in _solutions(kind, nearer, wanted, rounds - 1))


def _assignments(
    now: Mapping[Size, float], fields: Fields, wanted: Mapping[Size, int], changes: Mapping[str, int]
) -> Iterator[dict[str, int]]:
    """Values of fields that together explain every size, if sizes add up."""
    wrong = next((size for size, value in now.items() if value != wanted[size]), None)
    if wrong is None:
        yield dict(changes)
        return
    for path, slopes in fields.slopes.items():
        if path in changes or wrong not in slopes:
            continue
        step = (wanted[wrong] - now[wrong]) / slopes[wrong]
        value = fields.values[path] + step
        if value == int(value) and value > 0:
            after = {size: one + step * slopes.get(size, 0) for size, one in now.items()}
            yield from _assignments(after, fields, wanted, {**changes, path: int(value)})


def _with_biases(
    kind: type[nn.Module], config: PretrainedConfig, shapes: Shapes
) -> tuple[PretrainedConfig, dict[str, tuple[int, ...]]]:
    """A configuration under which the class has the network's biases, and those that it has then besides."""
    now = shapes_of(skeleton(kind, config))
    missing = [name for name in shapes if name not in now]
    for path in [name for name, value in config.to_dict().items() if value is False and "bias" in name]:
        if not missing:
            break
        other = with_fields(config, {path: True})
        more = shapes_of(skeleton(kind, other))
        if any(name in more for name in missing):
            config, now = other, more
            missing = [name for name in shapes if name not in now]
    extra = [name for name in now if name not in shapes]
    strange = missing + [name for name in extra if not name.endswith(".bias")]
    if strange:
        biases = all(name.endswith(".bias") for name in strange)
        raise NotStockError(
            f"{kind.__name__} has no {_some(strange)}"
            + (": layers were given a bias that they did not have" if biases else "")
            if missing
            else f"the network has no {_some(strange)}"
        )
    return config, {name: _bias_shape(shapes, name, now[name]) for name in extra}


def _bias_shape(shapes: Shapes, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """As long as its layer's weight is wide."""
    weight = shapes.get(f"{name.removesuffix('bias')}weight")
    return shape if weight is None else weight[:1]


def _tied(network: nn.Module) -> set[frozenset[str]]:
    """Names of parameters that are one."""
    names: dict[int, set[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {frozenset(one) for one in names.values() if len(one) > 1}


def _numbers(network: nn.Module) -> dict[str, float]:
    """Numbers that a network's own modules hold."""
    return {
        f"{name}.{leaf}": value
        for name, module in network.named_modules()
        if not type(module).__module__.startswith("torch.") or isinstance(module, nn.LayerNorm | nn.RMSNorm)
        for leaf, value in vars(module).items()
        if not leaf.startswith("_") and type(value) in (int, float)
    }


def _told(network: nn.Module, fields: Fields) -> dict[str, int]:
    """Fields of which modules hold other values under their names, all the same: ``head_dim``, for one."""
    held: dict[str, set[float]] = {}
    for name, value in _numbers(network).items():
        held.setdefault(name.rpartition(".")[2], set()).add(value)
    told = {path: held.get(path.rpartition(".")[2], set()) for path in fields.values}
    return {
        path: int(value)
        for path, one in told.items()
        if len(one) == 1 and (value := min(one)) != fields.values[path]
    }


def _numbers_apart(one: nn.Module, other: nn.Module) -> dict[str, tuple[float, float]]:
    """Numbers that the modules of two networks hold differently."""
    a, b = _numbers(one), _numbers(other)
    return {name: (a[name], b[name]) for name in a if name in b and a[name] != b[name]}


def with_numbers(network: nn.Module, config: PretrainedConfig) -> PretrainedConfig:
    """The configuration with the network's own small numbers, such as of norms.

    Whole numbers may be what they were before a cut, where no code reads them.
    """
    kind = type(network)

    def apart(config: PretrainedConfig) -> dict[str, tuple[float, float]]:
        found = _numbers_apart(skeleton(kind, config), network)
        return {name: pair for name, pair in found.items() if type(pair[0]) is float}

    wrong = apart(config)
    for path, value in config.to_dict().items():
        wanted = {now for old, now in wrong.values() if old == value}
        if type(value) is float and len(wanted) == 1:
            other = with_fields(config, {path: wanted.pop()})
            if len(left := apart(other)) < len(wrong):
                config, wrong = other, left
    if wrong:
        name, (old, now) = next(iter(wrong.items()))
        more = f", and {len(wrong) - 1} more numbers differ" if len(wrong) > 1 else ""
        raise NotStockError(f"{name} is {now:.6g}, but {old:.6g} by the configuration{more}")
    return config


def _complaint(kind: type[nn.Module], fields: Fields, wanted: Shapes) -> str:
    """Which fields would need several values, or which sizes no field describes."""
    config = fields.config
    now, flat = _sizes(kind, config, {}) or {}, _flat(wanted)
    wrong = [size for size in flat if now.get(size) != flat[size]]
    needed: dict[str, dict[float, list[str]]] = {}
    for size in wrong:
        able = [path for path, slopes in fields.slopes.items() if size in slopes]
        if not able:
            name, axis = size
            return (
                f"no field of {type(config).__name__} gives {name} the size {flat[size]} (dimension {axis})"
            )
        # The most special field.
        path = min(able, key=lambda one: len(fields.slopes[one]))
        value = fields.values[path] + (flat[size] - now[size]) / fields.slopes[path][size]
        needed.setdefault(path, {}).setdefault(value, []).append(size[0].rpartition(".")[0])
    for path, slopes in fields.slopes.items():
        # Layers that are as wide as before, while others are not.
        for size in slopes:
            if path in needed and size not in wrong:
                needed[path].setdefault(float(fields.values[path]), []).append(size[0].rpartition(".")[0])
    says = [f"{path} would be {_several(by)}" for path, by in needed.items() if len(by) > 1]
    together = ", ".join(f"{path} = {next(iter(by)):g}" for path, by in needed.items())
    return "; ".join(says) or f"{type(config).__name__} refuses {together}"


def _several(layers: Mapping[float, Sequence[str]]) -> str:
    """Values, each with the layers that have it."""
    return " and ".join(f"{value:g} ({_some([*dict.fromkeys(own)])})" for value, own in layers.items())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"

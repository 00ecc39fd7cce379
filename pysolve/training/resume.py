"""Checkpoints of a training, from which it resumes as though it had not been interrupted."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils import _pytree as pytree

from pysolve.errors import DataError
from pysolve.nn.running import device_of
from pysolve.training.options import State, Step
from pysolve.whole_files import crc32_of, replacing

_VERSION = 2
# Bytes of the CRC-32 behind the archive, of all of it: its own leave out names and directory.
_SEAL = 4


@dataclass
class Progress:
    """Progress of a training, updated in place.

    Steps ``done`` and the position on the schedule; seconds ``elapsed``, and those of them ``before`` the
    first step; mean losses of the finished epochs; the best ``score`` so far, of the values in ``best``, from
    ``stale`` epochs ago.
    """

    done: int = 0
    position: int = 0
    elapsed: float = 0.0
    before: float = 0.0
    losses: list[float] = field(default_factory=list)
    score: float = -math.inf
    stale: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    finished: bool = False


@dataclass(frozen=True)
class Parts:
    """Everything that training changes: ``modules`` are the network and its auxiliary ones.

    ``generators`` are those of the batches, besides torch's global random state. Where ``after_step`` has
    ``state_dict`` and ``load_state_dict``, its state is kept, too.
    """

    modules: Sequence[nn.Module]
    optimizer: Optimizer
    schedule: LRScheduler
    generators: Sequence[torch.Generator]
    after_step: Step | None = None


def plain(value: object) -> object:
    """A NumPy number as a Python one, which files may hold."""
    return value.item() if hasattr(value, "item") else value


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, persistent or not, each under its first name."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Copies of a network's tensors."""
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into a network's tensors, in place."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(values[name])


def write(path: Path, progress: Progress, parts: Parts, settings: Mapping[str, object]) -> None:
    """Write a training's state, completely or not at all."""
    state = {
        "pysolve training": _VERSION,
        "settings": {**settings, **_layout(parts)},
        "progress": vars(progress),
        **_state(parts),
    }
    size = sum(one.nbytes for one in pytree.tree_leaves(state) if isinstance(one, Tensor))
    # Given a path, torch tells of a full disk without the system's words.
    with replacing(path, size) as part, part.open("w+b") as file:
        torch.save(state, file)
        seal(file)


def seal(file: BinaryIO) -> None:
    """Put the checksum of a file's whole content behind it."""
    size = file.tell()
    file.seek(0)
    found = crc32_of(file, size)
    file.write(found.to_bytes(_SEAL, "little"))


def read(path: Path, parts: Parts, settings: Mapping[str, object]) -> Progress:
    """Restore a training's state from a file, if it exists, and return its progress.

    Raises
    ------
    DataError
        The file is damaged, or of another training; then nothing has changed.
    """
    if not path.parent.is_dir():
        raise DataError(f"checkpoint {path} cannot be written: there is no folder {path.parent}.")
    if not path.exists():
        return Progress()
    if path.is_dir():
        raise DataError(f"checkpoint {path} is a folder: give a file.")
    state = _loaded(path)
    try:
        _check_same(path, state["settings"], {**settings, **_layout(parts)})
        progress = _progress(state["progress"], parts.modules[0])
        for module, values in zip(parts.modules, state["modules"], strict=True):
            _check_alike(values, tensors_of(module))
        _check_optimizer(state["optimizer"], parts.optimizer)
        _check_step(state["optimizer"], parts.optimizer)
        before = deepcopy(_state(parts))
        try:
            _restore(state, parts)
        except Exception:
            _restore(before, parts)
            raise
    except DataError:
        raise
    except Exception as error:
        raise _broken(path, f"it lacks {error}" if isinstance(error, KeyError) else str(error)) from error
    # Learning rates are in the optimizer's state; a schedule needs its position alone.
    parts.schedule.last_epoch = progress.position
    return progress


def _broken(path: Path, why: str) -> DataError:
    return DataError(
        f"{path} is damaged, or no checkpoint: {why.rstrip('.')}. Give another path, or remove it."
    )


def _loaded(path: Path) -> State:
    """The state in a file that may hold anything."""
    with open(path, "rb") as file:
        try:
            # Other files torch would take for its older format, and warn.
            if not zipfile.is_zipfile(file):
                raise _broken(path, "it is no archive")
            size = max(os.fstat(file.fileno()).st_size - _SEAL, 0)
            file.seek(0)
            if crc32_of(file, size).to_bytes(_SEAL, "little") != file.read():
                raise _broken(path, "its checksum is wrong")
            file.seek(0)
            # Plain tensors and numbers alone: such files are safe whoever wrote them.
            state: object = torch.load(file, map_location="cpu", weights_only=True)
        except DataError:
            raise
        except Exception as error:
            raise _broken(path, (str(error).splitlines() or [type(error).__name__])[0]) from error
    if not isinstance(state, dict) or state.get("pysolve training") != _VERSION:
        raise DataError(f"{path} is no checkpoint of a training that this pysolve knows: give another path.")
    return state


def _state(parts: Parts) -> State:
    """What a training changes, beside its progress."""
    own = getattr(parts.after_step, "state_dict", None)
    return {
        "modules": [copied(module) for module in parts.modules],
        "optimizer": parts.optimizer.state_dict(),
        "after_step": None if own is None else own(),
        "random": _random(parts),
    }


def _restore(state: State, parts: Parts) -> None:
    for module, values in zip(parts.modules, state["modules"], strict=True):
        put(module, values)
    parts.optimizer.load_state_dict(state["optimizer"])
    own = getattr(parts.after_step, "load_state_dict", None)
    if own is not None:
        own(state["after_step"])
    _set_random(parts, state["random"])


def _progress(saved: object, model: nn.Module) -> Progress:
    """Progress of the types and signs that it may have."""
    if not isinstance(saved, dict):
        raise TypeError("its progress is none")
    found = Progress(**{one.name: saved[one.name] for one in fields(Progress)})
    for name, value in vars(Progress()).items():
        if type(getattr(found, name)) is not type(value):
            raise TypeError(f"expected {name} of its progress to be {value!r} or so")
    # Losses may be no floats but what functions of the user gave.
    numbers = [found.done, found.position, found.stale, found.elapsed, found.before]
    if not all(0 <= one < math.inf for one in numbers) or not all(map(math.isfinite, found.losses)):
        raise ValueError("its progress has negative or infinite numbers")
    if found.best or found.score > -math.inf:
        _check_alike(found.best, tensors_of(model))
    return found


def _check_alike(saved: object, now: Mapping[str, Tensor]) -> None:
    """Raise unless a file's tensors are those of these names, shapes and types."""
    if not isinstance(saved, dict) or saved.keys() != now.keys():
        raise ValueError("its tensors are not those of the network")
    for name, own in now.items():
        value = saved[name]
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (own.shape, own.dtype):
            raise ValueError(f"{name} is no {own.dtype} of shape {[*own.shape]}")


def _check_optimizer(saved: State, optimizer: Optimizer) -> None:
    """Raise unless a file's optimizer has the options and the parameters of this one."""
    groups, own_groups = optimizer.param_groups, optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own_groups]:
        raise ValueError("its optimizer's parameters are others")
    for group, own in zip(saved["param_groups"], groups, strict=True):
        for name in own.keys() - {"params"}:
            value, known = group[name], own[name]
            # What schedules move are numbers.
            moves = isinstance(known, float | int | tuple | Tensor) and not isinstance(known, bool)
            numbers = [one for one in pytree.tree_leaves(value) if one is not None]
            if type(value) is not type(known) or (not moves and value != known):
                raise ValueError(f"{name} of its optimizer is {value!r}, not {known!r}")
            if moves and not all(math.isfinite(one) for one in numbers):
                raise ValueError(f"{name} of its optimizer is {value!r}")
    parameters = [value for group in groups for value in group["params"]]
    states = saved["state"]
    if not states.keys() <= {*range(len(parameters))}:
        raise ValueError("its optimizer's state is not that of these parameters")
    # Adafactor keeps other values of matrices than of vectors.
    names = {parameters[number].ndim: one.keys() for number, one in states.items()}
    for number, one in states.items():
        if one.keys() != names[parameters[number].ndim]:
            raise ValueError("its optimizer's state is not that of these parameters")
        for name, value in one.items():
            counts = isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)
            if isinstance(value, Tensor) and not (value.is_floating_point() or counts):
                raise ValueError(f"{name} of parameter {number} is {value.dtype}")


def _check_step(saved: State, optimizer: Optimizer) -> None:
    """Raise where a copy of the optimizer takes no step with a file's state, but takes one with its own.

    Which shapes a state has is each optimizer's own affair.
    """
    error = _step_error(optimizer, saved)
    if error is not None and _step_error(optimizer, optimizer.state_dict()) is None:
        raise ValueError(f"its optimizer's state is not that of these parameters: {error}")


def _step_error(optimizer: Optimizer, state: State) -> Exception | None:
    """What a copy of an optimizer raises in a step without gradients from some state."""
    try:
        own = deepcopy(optimizer)
        own.load_state_dict(deepcopy(dict(state)))
        for parameter in chain.from_iterable(group["params"] for group in own.param_groups):
            parameter.grad = torch.zeros_like(parameter)
        # A schedule has put a method of the original in the place of the copy's.
        type(own).step(own, lambda: 0.0)
    except Exception as error:
        return error
    return None


def _layout(parts: Parts) -> dict[str, object]:
    """Names, shapes and types of all tensors, and which of them are trained."""
    layout: dict[str, object] = {}
    for i, module in enumerate(parts.modules):
        for name, tensor in tensors_of(module).items():
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            where = name if i == 0 else f"auxiliary {name}"
            layout[where] = f"{kind}, trained" if tensor.requires_grad else kind
    return {**layout, "random generators of the batches": len(parts.generators)}


def _check_same(path: Path, saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Refuse a file of another training, naming the first few differences."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        said = "; ".join(f"{name} was {saved.get(name)}, now it is {now.get(name)}" for name in names[:3])
        more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
        raise DataError(
            f"{path} is of another training: {said}{more}. Train as then, or give another checkpoint."
        )


def _random(parts: Parts) -> dict[str, object]:
    """Random states of torch, of the accelerator in use and of the batches."""
    device = _accelerator(parts)
    return {
        "global": torch.get_rng_state(),
        "device": None if device is None else torch.cuda.get_rng_state(device),
        "generators": [generator.get_state() for generator in parts.generators],
    }


def _set_random(parts: Parts, saved: State) -> None:
    device = _accelerator(parts)
    torch.set_rng_state(saved["global"])
    if device is not None and saved["device"] is not None:
        torch.cuda.set_rng_state(saved["device"], device)
    for generator, state in zip(parts.generators, saved["generators"], strict=True):
        generator.set_state(state)


def _accelerator(parts: Parts) -> torch.device | None:
    device = device_of(parts.modules[0])
    return device if device.type == "cuda" else None

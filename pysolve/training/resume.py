"""Where a training stands, in a file: to go on from after a stop as though there had been none."""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from pysolve.errors import DataError

_VERSION = 1


@dataclass
class Progress:
    """How far a training is.

    Parameters
    ----------
    done, position : int
        Steps, and the place on the schedule.
    elapsed, before : float
        Seconds, and how many of them no step was taken in.
    losses : list of float
        Of the epochs that are done.
    score : float
        The best so far, of ``best``, and ``stale`` epochs ago.
    best : dict of tensors
    finished : bool
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
    """All that training changes.

    Parameters
    ----------
    modules : sequence of nn.Module
        The network, and what is learnt beside it.
    optimizer : Optimizer
    schedule : LRScheduler
    generators : sequence of torch.Generator
        That the batches come from, beside torch's global random state.
    after_step : callable, optional
        What is called after each step; with ``state_dict`` and ``load_state_dict`` its state is kept, too.
    """

    modules: Sequence[nn.Module]
    optimizer: Optimizer
    schedule: LRScheduler
    generators: Sequence[torch.Generator]
    after_step: Any = None


def plain(value: Any) -> Any:
    """NumPy's numbers as Python's, which files may hold."""
    return value.item() if hasattr(value, "item") else value


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, those too that no state dict holds; each under its first name."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors_of(model).items()}


def put(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Write values into a network's tensors, in place."""
    with torch.no_grad():
        for name, tensor in tensors_of(model).items():
            tensor.copy_(values[name])


def write(path: Path, progress: Progress, parts: Parts, settings: Mapping[str, Any]) -> None:
    """Write a training's state, complete or not at all."""
    own = getattr(parts.after_step, "state_dict", None)
    state = {
        "pysolve training": _VERSION,
        "settings": {**settings, **_layout(parts)},
        "progress": vars(progress),
        "modules": [copied(module) for module in parts.modules],
        "optimizer": parts.optimizer.state_dict(),
        "after_step": None if own is None else own(),
        "random": _random(parts),
    }
    part = path.with_name(path.name + ".part")
    torch.save(state, part)
    os.replace(part, path)


def read(path: Path, parts: Parts, settings: Mapping[str, Any]) -> Progress:
    """Put a training's state in place, of the file if there is one, and say how far it was."""
    if not path.parent.is_dir():
        raise DataError(f"checkpoint {path} cannot be written: there is no folder {path.parent}.")
    if not path.exists():
        return Progress()
    state = _loaded(path)
    if not isinstance(state, dict) or state.get("pysolve training") != _VERSION:
        raise DataError(f"{path} is no checkpoint of a training that this pysolve knows: give another path.")
    _check_same(path, state["settings"], {**settings, **_layout(parts)})
    for module, values in zip(parts.modules, state["modules"], strict=True):
        put(module, values)
    parts.optimizer.load_state_dict(state["optimizer"])
    own = getattr(parts.after_step, "load_state_dict", None)
    if own is not None:
        own(state["after_step"])
    _set_random(parts, state["random"])
    known = {one.name for one in fields(Progress)}
    progress = Progress(**{name: value for name, value in state["progress"].items() if name in known})
    # Learning rates are the optimizer's state; the schedules know them from their place alone.
    parts.schedule.last_epoch = progress.position
    return progress


def _loaded(path: Path) -> Any:
    """The content of a file that may be anything."""
    broken = DataError(f"{path} is damaged, or no checkpoint: give another path, or remove it.")
    # Other files torch would take for its older format, and warn.
    if not zipfile.is_zipfile(path):
        raise broken
    try:
        # Plain tensors and numbers alone: such files are safe whoever wrote them.
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:
        raise broken from error


def _layout(parts: Parts) -> dict[str, Any]:
    """Names, shapes, types of all tensors, and which of them are trained."""
    layout = {}
    for i, module in enumerate(parts.modules):
        for name, tensor in tensors_of(module).items():
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            where = name if i == 0 else f"beside it, {name}"
            layout[where] = f"{kind}, trained" if tensor.requires_grad else kind
    return {**layout, "random generators of the batches": len(parts.generators)}


def _check_same(path: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse a file of another training, naming the first few differences."""
    names = [name for name in {**saved, **now} if saved.get(name) != now.get(name)]
    if names:
        told = "; ".join(f"{name} was {saved.get(name)}, now it is {now.get(name)}" for name in names[:3])
        more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
        raise DataError(
            f"{path} is of another training: {told}{more}. Train as then, or give another checkpoint."
        )


def _random(parts: Parts) -> dict[str, Any]:
    """Random states: torch's, that of an accelerator that is used, and those of the batches."""
    device = _accelerator(parts)
    return {
        "global": torch.get_rng_state(),
        "device": None if device is None else torch.cuda.get_rng_state(device),
        "generators": [generator.get_state() for generator in parts.generators],
    }


def _set_random(parts: Parts, saved: Mapping[str, Any]) -> None:
    device = _accelerator(parts)
    torch.set_rng_state(saved["global"])
    if device is not None and saved["device"] is not None:
        torch.cuda.set_rng_state(saved["device"], device)
    for generator, state in zip(parts.generators, saved["generators"], strict=True):
        generator.set_state(state)


def _accelerator(parts: Parts) -> torch.device | None:
    device = next((tensor.device for tensor in parts.modules[0].parameters()), torch.device("cpu"))
    return device if device.type == "cuda" else None

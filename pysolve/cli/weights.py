"""Weights of a network from a file, which is never executed."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pysolve.errors import DataError
from pysolve.nn.files.storage import is_compressed

# What training scripts call a state dict among other things of a checkpoint, and wrappers of networks.
_HOLDERS = ("state_dict", "model_state_dict", "model", "model_state", "net", "network", "weights", "module")
_WRAPPERS = ("module", "model", "_orig_mod")
_COMPILED = re.compile(r"(^|\.)_orig_mod(?=\.|$)")
_GLOBAL = re.compile(r"GLOBAL (\S+)")
# Lines of torch's list of differences, and characters of each.
_LINES, _LENGTH = 5, 200


def fill(model: nn.Module, path: Path, network: str) -> None:
    """Put the state dict of a file into a network, in place.

    A checkpoint's other entries are left out, and prefixes that ``DataParallel``, ``torch.compile`` and the
    like put in front of names.

    Raises
    ------
    DataError
        There is no such file, it holds no state dict, or one of another network than ``network`` makes.
    """
    state = _state(path)
    names, modules = model.state_dict(), dict(model.named_modules(remove_duplicate=False))
    values = OrderedDict((_bare(name, names), value) for name, value in state.items())
    given, tries = getattr(state, "_metadata", None), list[Mapping[str, object] | None]()
    if given is not None:
        tries = [{_bare(name, modules): version for name, version in given.items()}]
    else:
        # A file without versions of layers is taken for one of today, or else, as torch does, of long ago.
        tries = [names._metadata, None]  # type: ignore[attr-defined]
    problems = []
    for versions in tries:
        if not (problem := _problem(model, values, versions)):
            return
        problems.append(problem)
    raise DataError(f"{path} does not fit {network}: {problems[0]}")


def _problem(model: nn.Module, values: Mapping[str, Any], versions: Mapping[str, object] | None) -> str:
    """Load a state dict; why it does not fit, or ""."""
    state = OrderedDict(values)
    if versions is not None:
        state._metadata = versions  # type: ignore[attr-defined]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        lines = str(error).splitlines()
        more = [f"… and {len(lines) - _LINES} more"] if len(lines) > _LINES else []
        return " ".join([*(_short(line.strip()) for line in lines[:_LINES]), *more])
    return ""


def _short(line: str) -> str:
    return line if len(line) <= _LENGTH else f"{line[:_LENGTH]} …"


def _bare(name: str, names: Collection[str]) -> str:
    """A name without wrappers' prefixes, where that is one of the network's; else as it is."""
    bare = name if name in names else _COMPILED.sub("", name).lstrip(".")
    while bare not in names and bare.partition(".")[0] in _WRAPPERS:
        bare = bare.partition(".")[2]
    return bare if bare in names else name


def _state(path: Path) -> Mapping[str, Any]:
    """Tensors by name, from a file that is never executed."""
    if path.is_dir():
        raise DataError(f"{path} is a folder: give the file of the weights.")
    if not path.is_file():
        raise DataError(f"there is no file {path}.")
    if is_compressed(path):
        raise DataError(
            f"{path} is a compressed network, not weights of the original: evaluate takes it as "
            "--compressed, Python as pysolve.load(path, original)."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state: object = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        why = str(error) or "it is empty"
        raise DataError(f"{path} holds no state dict that can be read: {why}") from error
    except Exception as error:
        # The contract of torch.load does not name its errors for files that are no checkpoints.
        found = _GLOBAL.search(str(error))
        holds = f": it holds a {found[1]}" if found else ""
        raise DataError(
            f"{path} is not a file of tensors alone{holds}. Others are not read, for they could do anything: "
            "save model.state_dict()."
        ) from error
    return _unwrapped(state, path)


def _unwrapped(state: object, path: Path) -> Mapping[str, Any]:
    """The state dict among what a checkpoint holds."""
    while isinstance(state, Mapping) and not _is_state(state):
        inner = [state[name] for name in _HOLDERS if isinstance(state.get(name), Mapping)]
        if not inner:
            break
        state = inner[0]
    if not isinstance(state, Mapping) or not _is_state(state):
        found = ", ".join(map(str, [*state][:5])) if isinstance(state, Mapping) else type(state).__name__
        raise DataError(f"{path} holds no state dict: expected tensors by name, got {found or 'nothing'}.")
    return state


def _is_state(state: Mapping[Any, object]) -> bool:
    """Whether all entries are tensors, or what modules add to them."""
    return bool(state) and all(
        isinstance(value, Tensor) or str(name).endswith("_extra_state") for name, value in state.items()
    )

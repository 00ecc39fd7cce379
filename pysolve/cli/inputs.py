"""Networks and data as the command line names them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from inspect import signature
from numbers import Real
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.utils import _pytree as pytree

from pysolve.cli.arrays import arrays_in
from pysolve.cli.blame import told
from pysolve.cli.datasets import mnist
from pysolve.cli.weights import fill
from pysolve.errors import DataError, PysolveError
from pysolve.nn.evaluate import accuracy
from pysolve.nn.running import Batch, as_array, as_input, checked_device, device_of, evaluating, forward

Values = npt.NDArray[np.generic]

# Samples of a batch that is cut from an array.
_BATCH = 250


@dataclass(frozen=True, eq=False)
class Samples:
    """Inputs (n, …), with labels (n,) if there are some; or batches that a function made."""

    x: Values | None = None
    y: Values | None = None
    made: Iterable[Batch] = ()

    def batches(self, limit: int, device: str = "cpu") -> Iterable[Batch]:
        """Batches of at most ``limit`` samples of an array; all that a function made."""
        if self.x is None:
            if device == "cpu":
                return self.made
            return (pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), batch) for batch in self.made)
        x = self.x[:limit]
        parts = (torch.from_numpy(x[i : i + _BATCH].copy()) for i in range(0, len(x), _BATCH))
        return [part.to(device) for part in parts]

    def labelled(self) -> tuple[Values, Values]:
        """Inputs and labels; else DataError."""
        if self.x is None or self.y is None:
            raise DataError(
                "labels are needed: give an .npz file with x and y, a folder of IDX files, or a function "
                "that returns the pair (x, y)."
            )
        if self.y.dtype.kind not in "fiub":
            raise DataError(f"labels must be class numbers, got {self.y.dtype} of {self.y.shape}.")
        return self.x, self.y

    def check_finite(self, model: nn.Module, limit: int, option: str) -> None:
        """DataError for NaN or infinity in the first samples of an array, by their numbers in it.

        Networks may fill gaps: only what reaches their outputs is wrong.
        """
        if self.x is None or self.x.dtype.kind != "f":
            return
        x = self.x[:limit]
        wrong = np.flatnonzero(~np.isfinite(x.reshape(len(x), -1)).all(1)) if x.size else np.zeros(0)
        if not len(wrong):
            return
        with evaluating(model):
            leaves = pytree.tree_leaves(forward(model, as_input(model, x[wrong[:_BATCH]]), device_of(model)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not all(bool(tensor.isfinite().all()) for tensor in tensors):
            more = f", and {len(wrong) - 1:,} others" if len(wrong) > 1 else ""
            raise DataError(f"sample {wrong[0]} of {option}, counted from 0{more}, holds NaN or infinity.")


def load_network(name: str, weights: Path | None = None, device: str = "cpu") -> nn.Module:
    """Make the network of ``package.module:factory``, in evaluation mode, with weights from a file.

    The module is looked for as Python does, and in the current folder. Weights are a state dict:
    .safetensors, or what ``torch.save`` wrote, of which only tensors are read.
    """
    model = _called(name, "factory")
    if not isinstance(model, nn.Module):
        raise PysolveError(f"{name} must return a torch.nn.Module, got {type(model).__name__}.")
    if weights is not None:
        fill(model, weights, name)
    return model.to(checked_device(device)).eval()


def load_samples(name: str, *, train: bool = True) -> Samples:
    """Read or make the data that an argument names, of a folder with two parts the one to train on or not.

    A .npy file of inputs; an .npz file with x and perhaps y; a folder with MNIST-style IDX files; or
    ``package.module:function``, which returns an iterable of batches, inputs x, or a pair (x, y).
    """
    path = Path(name)
    if path.is_dir():
        dataset = mnist(path)
        return Samples(dataset.x_train, dataset.y_train) if train else Samples(dataset.x_test, dataset.y_test)
    if path.suffix in (".npy", ".npz"):
        return _arrays(path)
    if ":" not in name:
        raise DataError(f"{name} is no folder, no .npy or .npz file, and no package.module:function.")
    made = _called(name, "function")
    if isinstance(made, tuple) and len(made) == 2:
        return Samples(_inputs(_array(made[0]), name), _array(made[1]))
    if isinstance(made, torch.Tensor | np.ndarray):
        return Samples(_inputs(_array(made), name))
    if not isinstance(made, Iterable) or isinstance(made, Mapping | str):
        raise DataError(f"{name} must return batches, got {type(made).__name__}.")
    return Samples(made=made)


def load_score(name: str, model: nn.Module) -> Callable[[nn.Module], float]:
    """A network's score: its accuracy on labelled data, or what a function of the network returns.

    ``name`` is one that ``load_samples`` takes, checked with the ``model`` before any work, or a function of
    one argument, from a network to a number.
    """
    score = _imported(name, "function") if _names_code(name) else None
    if score is not None and _takes_one(score):

        def scored(network: nn.Module) -> float:
            found = _told(name, partial(score, network))
            if not isinstance(found, Real):
                raise PysolveError(f"{name} must return a number, a network's score, got {found!r}.")
            return float(found)

        return scored
    tested = load_samples(name, train=False)
    x, y = tested.labelled()
    tested.check_finite(model, len(x), "--test")
    return lambda network: accuracy(network, x, y)


def _names_code(name: str) -> bool:
    path = Path(name)
    return ":" in name and not path.exists() and path.suffix not in (".npy", ".npz")


def _takes_one(function: Callable[..., object]) -> bool:
    """Whether a function cannot be called without an argument."""
    try:
        needed = [one for one in signature(function).parameters.values() if one.default is one.empty]
    except (TypeError, ValueError):
        return False
    return any(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in needed)


def _called(name: str, what: str) -> object:
    """Result of the function that ``package.module:function`` names."""
    return _told(name, _imported(name, what))


def _told(name: str, call: Callable[[], object]) -> object:
    """Result of the user's code, whose errors name it."""
    try:
        return call()
    except (Exception, SystemExit) as error:
        raise PysolveError(f"{name} failed: {told(error)}") from error


def _imported(name: str, what: str) -> Callable[..., object]:
    """The function that ``package.module:function`` names."""
    module, _, function = name.partition(":")
    if not module or not function or "/" in module or module.endswith(".py"):
        raise PysolveError(f"expected package.module:{what}, as in import, got {name!r}.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: object = import_module(module)
    except (Exception, SystemExit) as error:
        raise PysolveError(f"{module} cannot be imported: {told(error)}") from error
    for part in function.split("."):
        if not hasattr(found, part):
            raise PysolveError(f"{module} has no {function!r}.")
        found = getattr(found, part)
    if not callable(found):
        raise PysolveError(f"{name} must be callable, got {type(found).__name__}.")
    return found


def _arrays(path: Path) -> Samples:
    """Inputs, and labels if there are some, of a NumPy file."""
    arrays = arrays_in(path)
    if "x" not in arrays:
        raise DataError(f"{path} has no array x; it has {', '.join(arrays) or 'none'}.")
    return Samples(
        _inputs(arrays["x"], f"x in {path}" if path.suffix == ".npz" else str(path)), arrays.get("y")
    )


def _inputs(x: Values, name: str) -> Values:
    """Inputs of networks: floats of any size in single precision, and integers."""
    if x.dtype.kind not in "fiub" or not x.ndim:
        raise DataError(
            f"{name} must hold an array of numbers, one row a sample, got {x.dtype} of {x.shape}."
        )
    return x.astype(np.float32 if x.dtype.kind == "f" else x.dtype.newbyteorder("="), copy=False)


def _array(values: object) -> Values:
    """What a function returned as an array, wherever it lies."""
    return as_array(values) if isinstance(values, torch.Tensor) else np.asarray(values)

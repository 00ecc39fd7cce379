"""Parameters and buffers that are no torch layer's: they lose values with the channels that they meet."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import Array, Indices, Mask
from pysolve.errors import CollapseError
from pysolve.nn.running import find_layer, layer_at
from pysolve.plan import EXPERTS


@dataclass(frozen=True)
class Bare:
    """A parameter or buffer that a module of the network's own holds; its channels are its entries, flat.

    Parameters
    ----------
    owner : nn.Module
    leaf : str
        Its name there.
    """

    owner: nn.Module
    leaf: str

    @property
    def values(self) -> Tensor:
        """The tensor as it is now."""
        tensor: Tensor = getattr(self.owner, self.leaf)
        return tensor

    @property
    def costs(self) -> Array:
        """(3,) parameters, MACs and bytes in a state dict."""
        kept = self.leaf not in self.owner._non_persistent_buffers_set
        entries = self.values.numel() * isinstance(self.values, nn.Parameter)
        return np.array([entries, 0.0, self.values.nbytes * kept])

    def places(self, kept: Mask) -> list[Indices]:
        """Kept indices along each dimension.

        Raises
        ------
        CollapseError
            When the kept entries are no block of rows and columns.
        """
        block = kept.reshape(self.values.shape)
        places = [
            np.flatnonzero(np.moveaxis(block, dim, 0).reshape(n, -1).any(1))
            for dim, n in enumerate(block.shape)
        ]
        if int(np.prod([len(one) for one in places])) != kept.sum():
            raise CollapseError(
                f"only whole rows or columns of `{self.leaf}` can go, not single entries of them."
            )
        return places

    def narrow(self, kept: Mask) -> None:
        """Cut the tensor in place of the old one."""
        old = self.values
        new = old.detach()
        for dim, places in enumerate(self.places(kept)):
            new = new.index_select(dim, torch.from_numpy(places).to(new.device))
        setattr(self.owner, self.leaf, _like(old, new))


@dataclass(frozen=True)
class Stack:
    """A matrix in a parameter, or several that are narrowed alike, such as those of all experts of a mixture.

    In a site it is named as in the state dict, and behind a colon by the order of its last two dimensions:
    ``experts.down_proj:oi`` for outputs before inputs, ``:io`` for inputs before outputs. As ``:e`` it is a
    parameter or buffer of any shape, whose first dimension counts the experts themselves. Weights of
    recurrent layers are the matrices of their gates, one below the other: ``lstm.weight_hh_l0:oi``.

    Parameters
    ----------
    owner : nn.Module
    leaf : str
        Its name there.
    order : "oi", "io" or "e"
    gates : int
        Matrices in a recurrent layer's weight; 0 of other parameters.
    """

    owner: nn.Module
    leaf: str
    order: str
    gates: int = 0

    @property
    def values(self) -> Tensor:
        """The tensor as it is now."""
        tensor: Tensor = getattr(self.owner, self.leaf)
        return tensor

    @property
    def matrices(self) -> Tensor:
        """(…, outputs, inputs), a view."""
        values = self._apart(self.values.detach())
        return values if self.order == "oi" else values.mT

    @property
    def outputs(self) -> int:
        """Rows of each matrix of  y = M x , or experts."""
        return self._apart(self.values).shape[self._dim("o")]

    @property
    def inputs(self) -> int:
        """Columns of each matrix of  y = M x , or experts."""
        return self._apart(self.values).shape[self._dim("i")]

    def narrow(self, rows: Mask, columns: Mask) -> None:
        """Cut the tensor in place of the old one."""
        old = self.values
        new = self._picked(self._picked(self._apart(old.detach()), "o", rows), "i", columns)
        setattr(self.owner, self.leaf, _like(old, self._together(new).contiguous()))
        if self.gates:
            owner = cast(nn.RNNBase | nn.RNNCellBase, self.owner)
            # All layers in it have as many hidden units; the first ones read its inputs.
            owner.hidden_size = int(rows.sum())
        first = self.gates and self.leaf.removesuffix("_reverse") in ("weight_ih_l0", "weight_ih")
        if first or (isinstance(self.owner, nn.RNNBase) and self.leaf == "weight_ih_l0_inner"):
            cast(nn.RNNBase, self.owner).input_size = int(columns.sum())

    def silenced(self, rows: Mask | None, columns: Mask | None) -> Tensor:
        """The tensor with zeros for the outputs and inputs that go."""
        values = self._apart(self.values.detach())
        for letter, kept in (("o", rows), ("i", columns)):
            if kept is not None:
                gone = torch.from_numpy(np.flatnonzero(~kept)).to(values.device)
                values = values.index_fill(self._dim(letter), gone, 0)
        return self._together(values)

    def _apart(self, values: Tensor) -> Tensor:
        """A recurrent layer's weight with a dimension for its gates; others as they are."""
        return values.reshape(self.gates, -1, values.shape[-1]) if self.gates else values

    def _together(self, values: Tensor) -> Tensor:
        return values.flatten(0, 1) if self.gates else values

    def _dim(self, letter: str) -> int:
        return 0 if self.order == EXPERTS else self.order.index(letter) - 2

    def _picked(self, tensor: Tensor, letter: str, kept: Mask) -> Tensor:
        places = torch.from_numpy(np.flatnonzero(kept)).to(tensor.device)
        return tensor if kept.all() else tensor.index_select(self._dim(letter), places)


@dataclass(frozen=True)
class Listed:
    """Experts that are modules in a list, in a site named as the list with ``:e`` behind it.

    Parameters
    ----------
    modules : nn.ModuleList
    """

    modules: nn.ModuleList

    @property
    def costs(self) -> Array:
        """(3,) parameters, MACs and bytes of all of them; MACs fall in no such way."""
        state = self.modules.state_dict(keep_vars=True).values()
        entries = sum(one.numel() for one in state if isinstance(one, nn.Parameter))
        return np.array([float(entries), 0.0, float(sum(one.nbytes for one in state))])

    def narrow(self, kept: Mask) -> None:
        """Leave modules out of the list, in place; those behind them get new names."""
        every = [*self.modules]
        while len(self.modules):
            self.modules.pop(-1)
        self.modules.extend(every[i] for i in np.flatnonzero(kept))


ORDERS = ("oi", "io", EXPERTS)
# Matrices in one weight of a recurrent layer.
GATES: Mapping[type[nn.Module], int] = {
    **{nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1},
    **{nn.LSTMCell: 4, nn.GRUCell: 3, nn.RNNCell: 1},
}


def is_stack(name: str) -> bool:
    """Whether a member of a site is named as matrices in one parameter."""
    return name.rpartition(":")[2] in ORDERS and ":" in name


def find_member(model: nn.Module, name: str) -> nn.Module | Bare | Stack | Listed:
    """The layer, stack, bare parameter or buffer of a name; LayerNotFoundError where there is none."""
    path = name.partition(":")[0]
    layers = ((one, layer_at(model, one)) for one in (name, path, path.rpartition(".")[0]))
    modules = {one: layer for one, layer in layers if layer is not None}
    return find_layer(model, name) if (found := member(modules, name)) is None else found


def member(modules: Mapping[str, nn.Module], name: str) -> nn.Module | Bare | Stack | Listed | None:
    """The same among modules under all their names; None where there is none."""
    if name in modules:
        return modules[name]
    path, _, order = name.partition(":")
    if order == EXPERTS and isinstance(listed := modules.get(path), nn.ModuleList):
        return Listed(listed)
    prefix, _, leaf = path.rpartition(".")
    owner = modules.get(prefix)
    if owner is None or leaf not in own_tensors(owner):
        return None
    if order not in ORDERS:
        return None if order else Bare(owner, leaf)
    tensor = getattr(owner, leaf)
    if order == EXPERTS:
        return Stack(owner, leaf, order) if tensor.ndim else None
    several = isinstance(tensor, nn.Parameter) and (
        tensor.ndim > 1 or (_gates(owner, leaf) and order == "oi")
    )
    return Stack(owner, leaf, order, _gates(owner, leaf)) if several else None


def forms_of_member(owner: nn.Module, leaf: str) -> tuple[Bare | Stack, ...]:
    """What a tensor may be in a site."""
    gates = _gates(owner, leaf)
    stacks = (Stack(owner, leaf, order, 0 if order == EXPERTS else gates) for order in ORDERS)
    return Bare(owner, leaf), *stacks


def _gates(owner: nn.Module, leaf: str) -> int:
    """Matrices in a weight of a recurrent layer, one below the other; 0 of other parameters."""
    return GATES.get(type(owner), 0) if leaf.startswith(("weight_ih", "weight_hh")) else 0


def own_tensors(owner: nn.Module) -> set[str]:
    """Names of the parameters and buffers that a module holds itself."""
    return {leaf for leaf, one in chain(owner._parameters.items(), owner._buffers.items()) if one is not None}


def _like(old: Tensor, new: Tensor) -> Tensor:
    """The new values as a parameter where the old ones were."""
    return nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new

"""Bare parameters and buffers: tensors of the network itself that lose values with the channels they meet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import Array, Indices, Mask
from pysolve.errors import CollapseError
from pysolve.nn.running import find_layer


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
        setattr(
            self.owner,
            self.leaf,
            nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new,
        )


def find_member(model: nn.Module, name: str) -> nn.Module | Bare:
    """The layer, bare parameter or buffer of a name; LayerNotFoundError where there is neither."""
    # Costs ask for every member of dozens of networks: listing all modules each time takes seconds.
    with suppress(AttributeError):
        return model.get_submodule(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    return find_layer(model, name) if (found := member(modules, name)) is None else found


def member(modules: Mapping[str, nn.Module], name: str) -> nn.Module | Bare | None:
    """The same among modules under all their names; None where there is neither."""
    if name in modules:
        return modules[name]
    prefix, _, leaf = name.rpartition(".")
    owner = modules.get(prefix)
    return Bare(owner, leaf) if owner is not None and leaf in own_tensors(owner) else None


def own_tensors(owner: nn.Module) -> set[str]:
    """Names of the parameters and buffers that a module holds itself."""
    return {leaf for leaf, one in chain(owner._parameters.items(), owner._buffers.items()) if one is not None}

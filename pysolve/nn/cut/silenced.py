"""Values with which a network that is as wide as the original ignores channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import Indices, Mask, all_but
from pysolve.nn.cut.bare import Bare, Stack, find_member, is_stack
from pysolve.nn.cut.slicing import channels_of, inputs, muted, outputs
from pysolve.plan import Site, of_experts, tensor_name


def silenced(model: nn.Module, keep: Mapping[Site, Indices]) -> dict[str, Tensor]:
    """Tensors with zeros for channels that go, by their names in the state dict.

    Inputs of matrices in one parameter, not all of which are refitted; and of sites with norms, whose means
    would count them, all that makes these channels. Other layers' inputs are refitted without. Experts that
    go lose their biases in the choice; their logits are for ``pysolve.nn.cut.routers``.
    """
    rows, columns, found = dict[str, Mask](), dict[str, Mask](), dict[str, Tensor]()
    for site, kept in keep.items():
        gone = all_but(site.channels, kept)
        if site.router is not None:
            found |= _never_chosen(model, site, gone)
            continue
        for name in filter(is_stack, site.readers):
            _drop(columns, model, site, "readers", name, gone)
        for role, name in site.makers:
            _drop(rows, model, site, role, name, gone)
    for name in rows | columns:
        member = find_member(model, name)
        if isinstance(member, Stack):
            found[name.partition(":")[0]] = member.silenced(rows.get(name), columns.get(name))
        else:
            owner = name.rpartition(".")[0] if isinstance(member, Bare) else name
            found |= {tensor_name(owner, leaf): one for leaf, one in muted(member, rows[name]).items()}
    return found


def _never_chosen(model: nn.Module, site: Site, gone: Indices) -> dict[str, Tensor]:
    """Numbers of experts that the choice adds, −∞ for those that go."""
    found = {}
    for name in filter(of_experts, site.writers):
        member = find_member(model, name)
        assert isinstance(member, Stack)
        values = member.values.detach()
        if values.ndim == 1 and values.is_floating_point():
            places = torch.as_tensor(channels_of(site, "writers", name, member)[gone].ravel())
            found[name.partition(":")[0]] = values.index_fill(0, places.to(values.device), -torch.inf)
    return found


def _drop(kept: dict[str, Mask], model: nn.Module, site: Site, role: str, name: str, gone: Indices) -> None:
    """Leave a member's entries of channels that go out of what is kept."""
    member = find_member(model, name)
    width = inputs(member) if role == "readers" else outputs(member)
    kept.setdefault(name, np.ones(width, bool))[channels_of(site, role, name, member)[gone]] = False

"""Values with which a network that is as wide as the original ignores channels."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from torch import Tensor, nn

from pysolve.correlations import Indices, Mask
from pysolve.nn.bare import Bare, Stack, find_member, is_stack
from pysolve.nn.slicing import channels_of, inputs, muted, outputs
from pysolve.plan import Site, tensor_name


def silenced(model: nn.Module, keep: Mapping[Site, Indices]) -> dict[str, Tensor]:
    """Tensors with zeros for channels that go, by their names in the state dict.

    Inputs of matrices in one parameter, which are not refitted; and of sites with norms, whose means would
    count them, all that makes these channels. Other layers' inputs are refitted without.
    """
    rows, columns = dict[str, Mask](), dict[str, Mask]()
    for site, kept in keep.items():
        gone = np.setdiff1d(np.arange(site.channels), kept)
        for name in filter(is_stack, site.readers):
            _drop(columns, model, site, "readers", name, gone)
        for role, name in site.makers:
            _drop(rows, model, site, role, name, gone)
    found = dict[str, Tensor]()
    for name in rows | columns:
        member = find_member(model, name)
        if isinstance(member, Stack):
            found[name.partition(":")[0]] = member.silenced(rows.get(name), columns.get(name))
        else:
            owner = name.rpartition(".")[0] if isinstance(member, Bare) else name
            found |= {tensor_name(owner, leaf): one for leaf, one in muted(member, rows[name]).items()}
    return found


def _drop(kept: dict[str, Mask], model: nn.Module, site: Site, role: str, name: str, gone: Indices) -> None:
    """Leave a member's entries of channels that go out of what is kept."""
    member = find_member(model, name)
    width = inputs(member) if role == "readers" else outputs(member)
    kept.setdefault(name, np.ones(width, bool))[channels_of(site, role, name, member)[gone]] = False

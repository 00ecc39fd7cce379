"""Residual branches none of whose channels are left: what stands in the place of their modules."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from pysolve.errors import CollapseError
from pysolve.nn.cut.bare import Bare, find_member
from pysolve.nn.cut.slicing import inputs, outputs
from pysolve.nn.layer_kinds import NORMS, WEIGHTED, plain
from pysolve.nn.layers.idle import Constant, Empty, PassedBy, norm_of_nothing, without_inputs, without_outputs
from pysolve.nn.layers.runtime import substitute
from pysolve.nn.running import find_layer
from pysolve.plan import Branch, Site

_IDLE = (Empty, Constant, PassedBy, nn.Identity)


def emptied(model: nn.Module, sites: Iterable[Site]) -> nn.Module:
    """The network with modules that compute nothing for sites none of whose channels are left, in place.

    Parameters
    ----------
    model : nn.Module
        Whose layers have been narrowed.
    sites : iterable of Site
        With a branch, all of whose channels were removed.
    """
    for site in sites:
        assert site.branch is not None
        for name in site.readers:
            model = _without_inputs(model, name, site.branch)
        for name in (*site.writers, *site.passed):
            member = find_member(model, name)
            # What reads another site that is gone has been replaced already.
            if not isinstance(member, (Bare, *_IDLE)) and not outputs(member):
                model = substitute(model, find_layer(model, name), without_outputs(find_layer(model, name)))
        for name in site.branch.idle:
            layer = find_layer(model, name)
            if layer is model:
                raise CollapseError("a branch that is gone cannot leave the whole network without work.")
            if not isinstance(layer, _IDLE):
                model = substitute(model, layer, without_outputs(layer))
    for site in sites:
        assert site.branch is not None
        if site.branch.whole:
            model = _passed_by(model, site, site.branch)
    return model


def _without_inputs(model: nn.Module, name: str, branch: Branch) -> nn.Module:
    layer = find_layer(model, name)
    if isinstance(layer, _IDLE):
        return model
    if plain(layer) not in WEIGHTED or inputs(layer):
        raise CollapseError(f"{name} still reads something when all channels of the branch are removed.")
    norm = branch.norms.get(name)
    if norm is None:
        return substitute(model, layer, without_inputs(layer, written=branch.written))
    behind = find_layer(model, norm)
    if plain(behind) not in NORMS or outputs(behind) != outputs(layer):
        raise CollapseError(f"{norm} is no batch norm over what {name} makes.")
    model = substitute(model, behind, norm_of_nothing(behind, layer, written=branch.written))
    return substitute(model, layer, without_outputs(layer))


def _passed_by(model: nn.Module, site: Site, branch: Branch) -> nn.Module:
    """The network with one module in the place of a whole branch."""
    name, module = site.readers[0], find_layer(model, branch.whole)
    constant = find_layer(model, name)
    if not name.startswith(f"{branch.whole}.") or not isinstance(constant, Constant):
        raise CollapseError(f"{branch.whole} holds no constant that {name} could leave of it.")
    path = name.removeprefix(f"{branch.whole}.")
    other = PassedBy(path, constant, branch.argument, branch.results, branch.position)
    return substitute(model, module, other.train(module.training))

"""Plans to smaller networks: a copy whose layers are really narrower, checked before and after the cut."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor, nn

from pysolve.errors import CollapseError, PysolveError
from pysolve.forms import Codebook, LowRank
from pysolve.nn.cut.attention import opened_for
from pysolve.nn.cut.bare import Listed, find_member
from pysolve.nn.cut.cuts import attribute, by_member, check_untied, counted, cuts_of_plan, numbered_in
from pysolve.nn.cut.emptied import emptied
from pysolve.nn.cut.heads import check_scale, keep_scale
from pysolve.nn.cut.norms import OverKept, kept_of_norms, norms_of, rescale
from pysolve.nn.cut.routers import choose_among, chosen_by_routers
from pysolve.nn.cut.silenced import silenced
from pysolve.nn.cut.slicing import (
    Cut,
    Narrowable,
    narrow,
    silence,
)
from pysolve.nn.cut.values import checked, load, new_values
from pysolve.nn.cut.verify import mismatch
from pysolve.nn.layer_kinds import tied_tables, twins
from pysolve.nn.layers.factored_embedding import FactoredEmbedding
from pysolve.nn.layers.factored_recurrent import check_gates, with_factors
from pysolve.nn.layers.runtime import check_form, in_form, substitute
from pysolve.nn.plain import unwrapped
from pysolve.nn.running import Batch, as_tensor, check_model, closest, find_layer
from pysolve.nn.state import copy_of, untie
from pysolve.plan import Collapse, Plan

# Most steps that an error names; finding each takes about 2 log2(steps) runs of the network.
_NAMED = 5


def apply(model: nn.Module, plan: Plan, *, probe: Batch = None) -> nn.Module:
    """Make the smaller network that a plan describes; the original is never changed.

    New values come first; then readers lose the columns of the removed channels, writers and passed layers
    the rows; then tensors take other forms, in their narrowed shapes. All steps refer to the original
    network: a layer may read and write several sites, or one site both ways; a layer under several names is
    cut once.

    Writers may be Linear, convolutions of any kind and Embedding; readers all of these but Embedding; passed
    layers grouped and depthwise convolutions, batch, instance and group norms, PReLU, constant padding of
    the channel dimension, and bare parameters and buffers, by their names in the state dict. Matrices in one
    parameter of the network's own, as of experts, write and read, too: ``experts.down_proj:oi``, or ``:io``
    where inputs come before outputs, and so do those of recurrent layers' gates, ``lstm.weight_hh_l0:oi``;
    whole experts go with the rows of their router, as ``:e``.
    From grouped layers whole groups are removed, or as many channels from each. Layers of classes that extend
    these are narrowed like them; only the probe tells whether their code still does the same. Layers that
    share their weight must lose the same of it, and go on sharing it. ``nn.MultiheadAttention`` whose
    projections the plan names (``q_proj``, ``k_proj``, ``v_proj``) becomes attention with these as layers.

    Parameters
    ----------
    model : nn.Module
    plan : Plan
    probe : one batch, optional
        A tensor, a tuple or list whose first item is the input, or a mapping of keyword arguments. The
        smaller network must give the same outputs on it as ``masked(model, plan)``, to 1e-4 of the largest
        output in float32 (1e-10 in float64, 0.05 in half precisions and with factored layers); if not,
        CollapseError. Layers that are to round their inputs do not round them for this.

    Returns
    -------
    nn.Module
        A copy with narrower layers: data types, devices, modes and ``requires_grad`` as they were.

    Raises
    ------
    CollapseError
        When the plan does not fit the network, by name and before anything is copied, or when the probe
        tells the two networks apart: names the steps that make the difference.
    LayerNotFoundError
        When the network has no layer of a name in the plan.

    Examples
    --------
    >>> import torch
    >>> import pysolve as ps
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))
    >>> import numpy as np
    >>> site = ps.Site(channels=64, writers=("0",), readers=("2",))
    >>> plan = ps.Plan((ps.Collapse(site, keep=np.arange(48)),))
    >>> ps.apply(model, plan, probe=torch.randn(10, 16))
    Sequential(
      (0): Linear(in_features=16, out_features=48, bias=True)
      (1): ReLU()
      (2): Linear(in_features=48, out_features=4, bias=True)
    )
    """
    check_model("model", model)
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be a Plan, such as a result's .plan, got {type(plan).__name__}.")
    model = _as_named(unwrapped(model), plan)
    smaller, layers, cuts = _prepared(model, plan)
    pairs = twins(smaller)
    tables = tied_tables(smaller)
    tied = {layers[name]: pairs[layers[name]] for name in cuts if layers.get(name) in pairs}
    lists = [name for name in cuts if isinstance(find_member(smaller, name), Listed)]
    for name in (one for one in cuts if one not in lists):
        narrow(find_member(smaller, name), cuts[name])
    for layer, others in tied.items():
        for other in others:
            other.weight = layer.weight
    for path, value in counted(model, plan).items():
        owner, leaf, position = attribute(path)
        old = getattr(layers[owner], leaf)
        new = value if position is None else (*old[:position], value, *old[position + 1 :])
        setattr(layers[owner], leaf, new)
    for norm, more in norms_of(model, plan).items():
        rescale(smaller, norm, more)
    for step in plan.steps:
        keep_scale(smaller, step, cuts)
    decoded = {name: form for name, form in plan.forms.items() if isinstance(form, Codebook)}
    load(smaller, {name: as_tensor(form.dense()) for name, form in decoded.items()})
    for name, form in plan.forms.items():
        if not isinstance(form, Codebook):
            owner, _, leaf = name.rpartition(".")
            layer = layers[owner]
            if isinstance(layer, nn.RNNBase) and isinstance(form, LowRank):
                # Its other weights may follow.
                made: nn.Module = with_factors(layer, leaf, form)
                layers = {one: made if own is layer else own for one, own in layers.items()}
            else:
                made = in_form(layer, form)
            smaller = substitute(smaller, layer, made)
            if layer in tables and isinstance(made, FactoredEmbedding):
                for other in tables[layer]:
                    smaller = substitute(smaller, other, made.tied(other))
    smaller = emptied(smaller, [step.site for step in plan.steps if not len(step.keep)])
    # Modules behind those that go get new names; of lists in lists the inner ones come first.
    for name in sorted(lists, key=len, reverse=True):
        narrow(find_member(smaller, name), cuts[name])
    if probe is not None:
        _verify(model, smaller, plan, probe)
    return smaller


def masked(model: nn.Module, plan: Plan) -> nn.Module:
    """A copy as wide as the original that ignores the channels a plan removes; ``apply`` must equal it.

    The plan's new values are in place, and the weights of all readers are zero for the removed channels;
    writers and passed layers stay as they are, but where norms would count what they make. Routers never
    choose experts that are removed.
    Forms are multiplied out, and those of narrowed layers put where the kept entries are. Raises what
    ``apply`` does, but runs nothing.
    """
    wide, _, cuts = _prepared(_as_named(unwrapped(model), plan), plan)
    for name, cut in cuts.items():
        one = find_member(wide, name)
        if not cut.columns.all() and not isinstance(one, Listed):
            silence(one, cut.columns)
    keep = {step.site: step.keep for step in plan.steps}
    load(wide, silenced(wide, keep))
    choose_among(wide, chosen_by_routers(wide, keep))
    for weight, kept in kept_of_norms(keep).items():
        name = weight.removesuffix(".weight")
        layer = find_layer(wide, name)
        narrow(layer, cuts[name])
        wide = substitute(wide, layer, OverKept(layer, torch.as_tensor(kept)))
    for norm, more in norms_of(model, plan).items():
        if norm.centred:
            rescale(wide, norm.inside, more)
    state, cut_members = wide.state_dict(keep_vars=True), by_member(wide, cuts)
    for name, form in plan.forms.items():
        dense, tensor = as_tensor(form.dense()), state[name].data
        narrowed = numbered_in(wide, name, cut_members)
        if narrowed is None:
            tensor.copy_(dense)
        else:
            places = getattr(narrowed, name.rpartition(".")[2]).long()
            tensor.put_(places.to(tensor.device), dense.to(tensor))
    return wide


def _as_named(model: nn.Module, plan: Plan) -> nn.Module:
    """The network with the layers and tensors that a plan names."""
    model = opened_for(model, plan)
    return untie(copy_of(model), plan.untied) if plan.untied else model


def _prepared(model: nn.Module, plan: Plan) -> tuple[nn.Module, dict[str, nn.Module], dict[str, Cut]]:
    """A copy with new values in their original shapes, its layers and their cuts; checks come first."""
    for step in plan.steps:
        if step.site.pinned is not None:
            raise CollapseError(f"the channels of {step.site.name} cannot be removed: {step.site.pinned}.")
        if len(step.keep) < min(1, step.site.least):
            remedy = "solve with lam below lam_max(r_xx, r_yx) instead"
            raise CollapseError(f"no channel of {step.site.name} would be left: {remedy}.")
    cuts = cuts_of_plan(model, plan)
    counted(model, plan)
    norms_of(model, plan)
    check_scale(model, plan)
    values = new_values(model, plan)
    members = by_member(model, cuts)
    _check_forms(model, plan, members)
    tables = tied_tables(model)
    # The factors of a table serve the layers that share it.
    forms = [
        name
        for name, form in plan.forms.items()
        if not isinstance(form, LowRank) or find_layer(model, name.rpartition(".")[0]) not in tables
    ]
    parts = [(name.rpartition(".")[0], name.rpartition(".")[2]) for name in (*values, *forms)]
    touched: set[tuple[Narrowable, str]] = {(find_layer(model, name), part) for name, part in parts}
    check_untied(model, touched | {(member, "") for member in members}, members)
    copied = copy_of(model)
    load(copied, values)
    return copied, dict(copied.named_modules(remove_duplicate=False)), cuts


def _check_forms(model: nn.Module, plan: Plan, cuts: Mapping[Narrowable, Cut]) -> None:
    """Refuse forms that do not fit the tensors as the cuts leave them."""
    state = model.state_dict(keep_vars=True)
    first: dict[tuple[nn.Module, str], str] = {}
    for name, form in plan.forms.items():
        owner, _, leaf = name.rpartition(".")
        if not isinstance(state.get(name), Tensor):
            meant = f"{name}.weight" if leaf != "weight" else name
            hint = closest(meant, state, "see model.state_dict().")
            raise CollapseError(f"{type(model).__name__} has no tensor {name!r}: {hint}")
        layer = find_layer(model, owner)
        if first.setdefault((layer, leaf), name) != name:
            raise CollapseError(f"{first[layer, leaf]} and {name} are one tensor, which can have one form.")
        narrowed = numbered_in(model, name, cuts) or layer
        try:
            if isinstance(form, Codebook):
                checked("decoded values", form.dense(), getattr(narrowed, leaf).shape, state[name].dtype)
            elif leaf != "weight":
                check_gates(layer, leaf, form, tuple(getattr(narrowed, leaf).shape))
            else:
                check_form(narrowed, form)
        except PysolveError as error:
            raise CollapseError(f"{name} cannot take this form: {error}") from error


def untrue_forms(model: nn.Module, plan: Plan, probe: Batch) -> list[str]:
    """Tensors whose layers the network cannot run in the forms of a plan: its code asks for more of them.

    Found by bisection; those that fail only together are all named.
    """

    def fails(some: Sequence[str]) -> bool:
        return bool(some) and _fails(
            model, replace(plan, forms={name: plan.forms[name] for name in some}), probe
        )

    def guilty(some: Sequence[str]) -> list[str]:
        middle = len(some) // 2
        halves = [half for half in (some[:middle], some[middle:]) if middle and fails(half)]
        return [name for half in halves for name in guilty(half)] or [*some]

    names = [name for name, form in plan.forms.items() if not isinstance(form, Codebook)]
    return guilty(names) if fails(names) and mismatch(model, model, probe) is None else []


def _verify(model: nn.Module, smaller: nn.Module, plan: Plan, probe: Batch) -> None:
    """Refuse a result that differs from the masked network, naming the steps that make the difference."""
    wide = masked(model, plan)
    problem = mismatch(wide, smaller, probe)
    if problem is None:
        return
    if mismatch(wide, wide, probe, seeds=(0, 1)) is not None:
        raise CollapseError(
            "the network gives another output each time it runs on the probe, so nothing can be verified: "
            "take the randomness out of its evaluation mode, or give no probe."
        )
    cut = replace(plan, forms={})
    if plan.forms and not _fails(model, cut, probe):
        raise CollapseError(
            f"the network computes something else with other forms of {', '.join([*plan.forms][:_NAMED])}: "
            f"{problem}. Does its code look into these layers, or have they hooks?"
        )
    guilty = [step.site.name for step in islice(_guilty(model, cut, probe), _NAMED + 1)]
    raise CollapseError(
        f"removing channels of {', '.join(guilty[:_NAMED])}{' and others' * (len(guilty) > _NAMED)} changes "
        f"more than it should: {problem}. Does something between the two layers mix channels (a norm, a "
        "softmax), or does another layer read them?"
    )


def _guilty(model: nn.Module, plan: Plan, probe: Batch) -> Iterator[Collapse]:
    """The steps of a failing plan that fail without the others, by bisection; all, when only together."""
    middle = len(plan.steps) // 2
    halves = [replace(plan, steps=plan.steps[:middle]), replace(plan, steps=plan.steps[middle:])]
    failing = [half for half in halves if middle and _fails(model, half, probe)]
    if not failing:
        yield from plan.steps
    for half in failing:
        yield from _guilty(model, half, probe)


def _fails(model: nn.Module, plan: Plan, probe: Batch) -> bool:
    try:
        return mismatch(masked(model, plan), apply(model, plan), probe) is not None
    except CollapseError:
        # Groups may lose equally many channels only in the whole plan.
        return False

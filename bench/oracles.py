"""What is wrong with a compressed network, judged by code that shares nothing with pysolve's own checks."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import pysolve as ps
from pysolve.compressed import Compressed
from pysolve.forms import Codebook, LowRank
from pysolve.nn.cut.attention import opened_for

# Of the largest output; of MACs.
TOLERANCE, MACS_TOLERANCE = 1e-3, 0.01


@dataclass(frozen=True, eq=False)
class Snapshot:
    """All that must be the same in a network after it was given to a verb."""

    state: dict[str, Tensor]
    rest: dict[str, Any]
    outputs: list[Tensor]


def snapshot(model: nn.Module, batch: Any) -> Snapshot:
    """State dict, modes, hooks, attributes and outputs of a network."""
    # Some networks settle on their first call: they choose a kind of attention, or keep tables.
    found = outputs(model, batch)
    state = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    rest: dict[str, Any] = {}
    for name, module in model.named_modules():
        hooks = [len(getattr(module, kind)) for kind in ("_forward_hooks", "_forward_pre_hooks")]
        attributes = sorted(key for key in module.__dict__ if not key.startswith("_"))
        rest[name] = (module.training, hooks, attributes, "forward" in module.__dict__)
    rest |= {f"{name}.requires_grad": value.requires_grad for name, value in model.named_parameters()}
    if hasattr(model, "config"):
        rest["config"] = repr(model.config)
    return Snapshot(state, rest, found)


def mistakes(
    model: nn.Module, before: Snapshot, result: Compressed, batch: Any, target: float | None
) -> Iterator[str]:
    """What is wrong with a result, in words; nothing if all is well."""
    yield from touched(model, before, batch)
    report, got = result.report, outputs(result.model, batch)
    if not all(map(finite, got)) and all(map(finite, before.outputs)):
        yield "outputs are not finite"
    if result.plan.steps:
        yield from difference("cut and masked", got, outputs(masked(model, result), batch), TOLERANCE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.safetensors"
        ps.save(result, path)
        loaded = ps.load(path, model)
        yield from difference("saved and loaded", outputs(loaded, batch), got, 0.0)
        if report.after.get("file", path.stat().st_size) != path.stat().st_size:
            yield f"the report says {report.after['file']} bytes, the file has {path.stat().st_size}"
    counts = [("before", model)]
    if not integers(result.model):
        counts.append(("after", result.model))
    for when, network in counts:
        told, count = getattr(report, when)["params"], parameters(network)
        if told != count:
            yield f"the report says {told} parameters {when}, there are {count}"
    if target is not None and report.after["params"] > target * report.before["params"]:
        yield f"target {target} missed: {report.share('params'):.4f}"
    yield from silence(model, result)


def silence(model: nn.Module, result: Compressed) -> Iterator[str]:
    """A result that is the network it was made of, without a word on why."""
    said = (*result.report.notes, *result.report.warnings, *(line.why for line in result.report.layers))
    if not changed(model, result) and not any(said):
        yield "nothing was done, and nothing said"


def changed(model: nn.Module, result: Compressed) -> bool:
    """Whether the result's tensors are others than the original's."""
    old, new = model.state_dict(), result.model.state_dict()
    return old.keys() != new.keys() or not all(
        same(value, new[name]) for name, value in old.items() if torch.is_tensor(value)
    )


def macs(model: nn.Module, result: Compressed, batch: Any) -> str:
    """How far the report's MACs are from torch's count; "" within tolerance."""
    found = []
    for when, network in (("before", model), ("after", result.model)):
        told, count = getattr(result.report, when)["macs"], counted(network, batch)
        if abs(told - count) > MACS_TOLERANCE * count:
            found.append(f"{when} {told:,} for {count:,.0f}")
    return "; ".join(found)


def counted(model: nn.Module, batch: Any) -> float:
    """Half of torch's floating-point operations for one sample alone, attention by its products."""
    one = pytree.tree_map_only(Tensor, lambda value: value[:1], batch)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            outputs(model, one)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return float(counter.get_total_flops()) / 2


def touched(model: nn.Module, before: Snapshot, batch: Any) -> Iterator[str]:
    """What has changed in the original."""
    now = snapshot(model, batch)
    if before.state.keys() != now.state.keys():
        yield "the original has other tensors than before"
    changes = [name for name, value in before.state.items() if not same(value, now.state.get(name))]
    changes += [name or "itself" for name, value in before.rest.items() if now.rest.get(name) != value]
    if changes:
        yield f"the original has changed: {', '.join(changes[:3])}"
    yield from difference("the original then and now", now.outputs, before.outputs, 0.0)


def masked(model: nn.Module, result: Compressed) -> nn.Module:
    """The original with a plan's values, whose readers have zeros for the channels that go."""
    wide = copy.deepcopy(opened_for(model, result.plan))
    modules = dict(wide.named_modules(remove_duplicate=False))
    with torch.no_grad():
        for name, value in result.plan.values.items():
            owner, _, leaf = name.rpartition(".")
            new, old = torch.as_tensor(np.array(value)), getattr(modules[owner], leaf, None)
            if old is None:
                setattr(modules[owner], leaf, nn.Parameter(new))
            else:
                old.copy_(new.reshape(old.shape))
        for name, (places, values) in decoded(model, result).items():
            weight = wide.get_parameter(name)
            weight.view(-1)[places] = values.to(weight.dtype)
        for step in result.plan.steps:
            if step.site.router is not None:
                for name in step.site.writers:
                    modules[name].register_forward_hook(partial(never, torch.as_tensor(step.removed)))
                continue
            # Of dimensions of heads, the products of queries with keys go without a layer that reads them.
            silent = {one.query for one in step.site.attention}
            # Norms count what is there: nothing of these.
            silent |= {*step.site.writers} if step.site.norms else set()
            for name in silent:
                mute(modules[name], step.site, name, step.removed)
            for norm in (one for one in step.site.norms if one.centred):
                layer = modules[norm.weight.removesuffix(".weight")]
                rows = step.site.rows_of(norm.layer, len(layer.weight))
                layer.forward = partial(over, layer, torch.as_tensor(rows[step.keep].ravel()))
            for name in step.site.readers:
                path, _, order = name.partition(":")
                if order:
                    matrices = wide.get_parameter(path)
                    matrices = matrices if order == "oi" else matrices.mT
                    width = matrices.shape[-1]
                    matrices[..., step.site.columns_of(name, width)[step.removed].ravel()] = 0
                else:
                    forget(modules[name], step.site, name, step.removed)
    return wide


def decoded(model: nn.Module, result: Compressed) -> dict[str, tuple[Tensor, Tensor]]:
    """Of codes and factors, where their values stand in the original's: numbers in their place are cut."""
    plan = result.plan
    books = {name: form for name, form in plan.forms.items() if isinstance(form, Codebook | LowRank)}
    numbered = copy.deepcopy(opened_for(model, plan)).double()
    for name in books:
        weight = numbered.get_parameter(name)
        weight.copy_(torch.arange(weight.numel()).view(weight.shape))
    cut = ps.apply(numbered, ps.Plan(plan.steps, untied=plan.untied)).state_dict()
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name, form in books.items():
        # Factors give outputs before inputs.
        turned = isinstance(form, LowRank) and type(modules.get(name[: -len(".weight")])).__name__ == "Conv1D"
        dense = torch.as_tensor(form.dense())
        found[name] = cut[name].long().flatten(), (dense.mT if turned else dense).flatten()
    return found


def never(experts: Tensor, layer: Any, given: Any, logits: Tensor) -> Tensor:
    """A router's logits that choose none of some experts."""
    return logits.index_fill(-1, experts, -torch.inf)


def over(layer: Any, kept: Tensor, x: Tensor) -> Tensor:
    """A layer norm that takes off the mean of some channels, and divides by what is left of all."""
    dim = -1 if x.shape[-1] == len(layer.weight) else 1
    x = x.movedim(dim, -1)
    y = x[..., kept] - x[..., kept].mean(-1, keepdim=True)
    y = y / (y.square().sum(-1, keepdim=True) / x.shape[-1] + layer.eps).sqrt()
    found = torch.zeros_like(x).index_copy(-1, kept, y * layer.weight[kept] + layer.bias[kept])
    return found.movedim(-1, dim)


def mute(layer: Any, site: ps.Site, name: str, removed: Any) -> None:
    """Zeros for the outputs of a layer that belong to removed channels."""
    # Of Conv1D inputs come first, of tables tokens.
    turned = type(layer).__name__ == "Conv1D" or isinstance(layer, nn.Embedding)
    rows = site.rows_of(name, layer.weight.shape[turned])[removed].ravel()
    (layer.weight.T if turned else layer.weight)[rows] = 0
    if getattr(layer, "bias", None) is not None:
        layer.bias[rows] = 0


def forget(layer: Any, site: ps.Site, name: str, removed: Any) -> None:
    """Zeros in a layer's weight for the inputs that belong to removed channels."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    # Of Conv1D and of transposed convolutions, inputs come first.
    first = "Transpose" in type(layer).__name__ or type(layer).__name__ == "Conv1D"
    gone = site.columns_of(name, len(weight) if first else weight.shape[1] * groups)[removed].ravel()
    if first:
        weight[gone] = 0
        return
    outs, ins = len(weight) // groups, weight.shape[1]
    for column in gone:
        group = column // ins
        weight[group * outs : (group + 1) * outs, column % ins] = 0


def difference(what: str, got: list[Tensor], wanted: list[Tensor], tolerance: float) -> Iterator[str]:
    """Outputs that differ by more than a share of the largest."""
    if [value.shape for value in got] != [value.shape for value in wanted]:
        yield f"{what}: outputs of other shapes"
        return
    for one, other in zip(got, wanted, strict=True):
        a, b = (torch.nan_to_num(value.double()) for value in (one, other))
        worst, largest = (float(value.abs().max()) if value.numel() else 0.0 for value in (a - b, b))
        if worst > tolerance * largest:
            yield f"{what}: outputs differ by {worst / max(largest, 1e-30):.1e}"
            return


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    """All tensors that a network returns for a batch, without touching its modes."""
    modes = {module: module.training for module in model.modules()}
    state = torch.get_rng_state()
    torch.manual_seed(0)
    try:
        with torch.no_grad():
            found = model.eval()(**batch) if isinstance(batch, dict) else model.eval()(batch)
    finally:
        torch.set_rng_state(state)
        for module, mode in modes.items():
            module.training = mode
    found = found.to_tuple() if hasattr(found, "to_tuple") else found
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def parameters(model: nn.Module) -> int:
    """Entries of all parameters, shared ones once."""
    return sum({id(value): value.numel() for value in model.parameters()}.values())


def integers(model: nn.Module) -> bool:
    """Whether weights are stored as integers, which are no parameters."""
    return any(value.dtype == torch.int8 for value in model.buffers())


def finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value).all())


def same(one: Any, other: Any) -> bool:
    if not (torch.is_tensor(one) and torch.is_tensor(other)):
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return (
        bool(((one == other) | (one.isnan() & other.isnan())).all())
        if one.is_floating_point()
        else bool(torch.equal(one, other))
    )

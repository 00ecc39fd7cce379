"""How the layers of a rebuilt network run: dense, sparse, factored, shared, masked or as integers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from pysolve.correlations import AnyArray
from pysolve.errors import CollapseError, one_of
from pysolve.forms import Codebook, Form, Integers, LowRank, Sparse
from pysolve.methods.kinds.codes import coded_bits
from pysolve.methods.kinds.embeddings import ASKS, linear_heads
from pysolve.methods.kinds.ranks import RankMenu
from pysolve.methods.rebuild import Rebuilt, forms_of
from pysolve.methods.study import Study
from pysolve.methods.tasks import names_of
from pysolve.methods.weights import weight_name
from pysolve.nn.batches.samples import samples_in, take
from pysolve.nn.cost.nonzeros import zero_rows
from pysolve.nn.cost.profile import latencies, layer_inputs
from pysolve.nn.cut.apply import apply, untrue_forms
from pysolve.nn.cut.silenced import silenced
from pysolve.nn.evaluate import latency, nbytes
from pysolve.nn.gathering.memory import output_bytes
from pysolve.nn.graph.sizes import traced_samples
from pysolve.nn.layer_kinds import EMBEDDINGS
from pysolve.nn.layers.base import Dense
from pysolve.nn.layers.factored import Factored, empty
from pysolve.nn.layers.masking import mask_weights
from pysolve.nn.layers.runtime import in_form
from pysolve.nn.layers.sharing import share_weights
from pysolve.nn.running import as_array, find_layer
from pysolve.nn.state import all_names, copy_of
from pysolve.plan import Collapse, Plan
from pysolve.report.rows import LayerReport

LAYOUTS = ("auto", "dense", "sparse", "factored", "shared", "masked")
# Calls that a layer is timed over, in each layout, and the share of the dense time that counts as faster.
_REPEATS, _FASTER = 15, 0.9
# Samples that a plan is verified on, of large outputs as many as have so many bytes.
PROBED, PROBED_BYTES = 16, 2**26


@dataclass(frozen=True, eq=False)
class LaidOut:
    """A plan, the network that it makes, and how each layer runs.

    Parameters
    ----------
    plan : Plan
    model : nn.Module
    lines : tuple of LayerReport
        Of the layers whose weights got another form.
    """

    plan: Plan
    model: nn.Module
    lines: tuple[LayerReport, ...]


def check_layout(layout: str, known: tuple[str, ...], what: str) -> None:
    """Refuse a layout that does not exist, or that this verb's weights cannot have."""
    one_of("layout", layout, LAYOUTS)
    if layout not in known:
        raise ValueError(f"layout={layout!r} is not for {what}: choose one of {', '.join(known)}.")


def lay_out(study: Study, rebuilt: Rebuilt, layout: str = "auto") -> LaidOut:
    """Decide how every weight runs, and make the network.

    Parameters
    ----------
    study : Study
    rebuilt : Rebuilt
    layout : str
        Of ``LAYOUTS``. "auto": sparse where that was measured to be faster and takes fewer bytes.
    """
    forms = forms_of(study, rebuilt)
    names = {name: weight_name(study.model, name) for name in rebuilt.chosen.fits if name in rebuilt.fits}
    # Layers are timed as wide as they will be.
    cut = layout == "auto" and any(len(keep) < site.channels for site, keep in rebuilt.chosen.keep.items())
    network = apply(study.model, plan_of(study, rebuilt, {})) if cut else study.model
    inputs = _inputs(study, network, names, layout)
    lines, kept = {}, dict[str, Form]()
    for name, tensor in names.items():
        # Integers of a transposed layer have no place in a plan; the report still counts their bits.
        form, weight = forms.get(tensor, rebuilt.fits[name].form), as_array(rebuilt.values[tensor])
        dense = weight if form is None else form.dense()
        line, chosen = _line(study, network, name, form, dense, layout, inputs.get(name))
        lines[name] = replace(line, error=rebuilt.fits[name].error)
        if chosen is not None:
            kept[tensor] = chosen
    # Times, and training by the clock, differ between processes.
    plan, lines = study.options.ranks.first((plan_of(study, rebuilt, kept), lines))
    held = study.held
    probe = take(held[0], 0, _probed(study)) if held and (plan.steps or _are_layers(plan)) else None
    try:
        model = apply(study.model, plan, probe=probe)
    except CollapseError:
        unable = untrue_forms(study.model, plan, probe) if plan.forms and probe is not None else []
        if not unable:
            raise
        lines |= {n: replace(lines[n], layout="dense", why=ASKS) for n, t in names.items() if t in unable}
        kept = {tensor: form for tensor, form in kept.items() if tensor not in unable}
        plan = plan_of(study, rebuilt, kept)
        model = apply(study.model, plan, probe=probe)
    if layout == "masked":
        layers = {name: tensor for name, tensor in names.items() if _is_layer(study, name)}
        mask_weights(model, {name: rebuilt.values[tensor] != 0 for name, tensor in layers.items()})
    if layout == "shared":
        books = {
            n: form
            for n, t in names.items()
            if isinstance(form := kept.get(t), Codebook) and _is_layer(study, n)
        }
        share_weights(model, books)
    return LaidOut(plan, model, tuple(lines.values()))


def _probed(study: Study) -> int:
    """How many samples a plan is verified on."""
    graph = study.graph
    each = 0 if graph is None else output_bytes(graph) // traced_samples(graph)
    return max(2, min(PROBED, PROBED_BYTES // max(1, each)))


def plan_of(study: Study, rebuilt: Rebuilt, forms: Mapping[str, Form] | None = None) -> Plan:
    """The plan of a rebuilt network; by default codebooks and factors as they are, all else dense."""
    forms = forms_of(study, rebuilt) if forms is None else forms
    steps = tuple(
        Collapse(site, keep) for site, keep in rebuilt.chosen.keep.items() if len(keep) < site.channels
    )
    # Zeros of what is cut anyway say nothing, and may stand in values that other layers share.
    fitted = {tensor for name in rebuilt.fits for tensor in names_of(study, name)}.union(rebuilt.stacks)
    formed = {name for tensor in forms for name in all_names(study.model, tensor)}
    unsaid = (silenced(study.model, rebuilt.chosen.keep).keys() - fitted) | formed
    values = {name: as_array(value) for name, value in rebuilt.values.items() if name not in unsaid}
    return Plan(steps, values, forms)


def seconds_of_both(study: Study, menu: RankMenu, rank: int, x: Tensor | None) -> tuple[float, float] | None:
    """Median seconds of a layer for its inputs, as it is and factored, by turns; None where not seen."""
    if x is None:
        return None
    name = str(menu.unit) if menu.table is None else linear_heads(study, menu.table.heads)[0]
    layer = find_layer(study.model, name)
    assert isinstance(layer, Dense)
    two = Factored.from_form(layer, empty(layer, rank, spatial=menu.spatial))
    before, after = latencies((copy_of(layer), two), x)
    return before.median, after.median


def _are_layers(plan: Plan) -> bool:
    return any(not isinstance(form, Codebook) for form in plan.forms.values())


def _is_layer(study: Study, name: str) -> bool:
    return weight_name(study.model, name) != name


def _inputs(study: Study, network: nn.Module, names: Mapping[str, str], layout: str) -> Mapping[str, Tensor]:
    """What a network's layers read, where they are to be timed."""
    layers = {name: find_layer(network, name) for name in names if _is_layer(study, name)}
    return layer_inputs(network, layers, study.held[0]) if layout == "auto" and study.held and layers else {}


def _line(
    study: Study,
    network: nn.Module,
    name: str,
    form: Form | None,
    dense: AnyArray,
    layout: str,
    x: Tensor | None,
) -> tuple[LayerReport, Form | None]:
    """What the report says of a weight, and the form that it is to have."""
    if isinstance(form, LowRank):
        return _factored(study, name, form), form
    if isinstance(form, Integers):
        return _integers(study, name, form)
    whole = max(1, dense.size)
    counted = max(1, whole - _padding(study, name, dense))
    line = LayerReport(name, np.count_nonzero(dense) / counted, "dense", "as asked")
    if isinstance(form, Codebook):
        why = f"{len(form.centroids)} values"
        line = replace(line, bits=coded_bits(form.codes) / whole, why=why)
        if layout == "shared" and _is_layer(study, name):
            return replace(line, layout="shared"), form
    if not _is_layer(study, name):
        return line if isinstance(form, Codebook) else replace(line, why="no layer's own weight"), form
    if layout not in ("auto", "sparse"):
        return replace(line, layout="masked" if layout == "masked" else "dense"), form
    sparse, reason = _sparse(find_layer(network, name), name, dense, layout, x, line)
    book = f"{line.why}; {reason}" if isinstance(form, Codebook) and layout == "auto" else reason
    line = replace(sparse, why=line.why if isinstance(form, Codebook) and layout == "sparse" else book)
    return line, Sparse.from_dense(dense) if sparse.layout == "sparse" else form


def _padding(study: Study, name: str, dense: AnyArray) -> int:
    """Entries in an embedding's rows of zeros, of which none can be removed."""
    if not isinstance(dict(study.model.named_modules()).get(name), EMBEDDINGS):
        return 0
    return int(zero_rows(study.weights[name]).sum()) * int(dense[0].size)


def _factored(study: Study, name: str, form: LowRank) -> LayerReport:
    outer = form.outer.shape[2:]
    spatial = any(size > 1 for size in outer)
    share, n = form.density, len(form.rows)
    why = f"{share:.0%} of the parameters" + (f", {n:,} rows exact" if n else "")
    return LayerReport(name, share, f"rank {form.rank}{', spatial' * spatial}", why)


def _integers(study: Study, name: str, form: Integers) -> tuple[LayerReport, Form | None]:
    """Layers run as integers where such a layer exists; else their weights are decoded."""
    whole, layer = max(1, form.codes.size), find_layer(study.model, name)
    able = bool(name) and type(layer) in (nn.Linear, nn.Conv2d)
    runs = ("int8, dynamic" if form.dynamic else "int8") if able else "dense"
    why = f"{form.bits} bits" if able else "this kind of layer has no form of integers"
    line = LayerReport(
        name, np.count_nonzero(form.codes) / whole, runs, why, bits=coded_bits(form.codes) / whole
    )
    return line, form if able else None


def _sparse(
    layer: nn.Module, name: str, weight: AnyArray, layout: str, x: Tensor | None, line: LayerReport
) -> tuple[LayerReport, str]:
    """Whether a layer is to run sparse, and why."""
    if not name:
        return line, "it is the whole network: put it into an nn.Sequential to run it sparse"
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return line, f"a {type(layer).__name__} has no sparse form"
    own = layer.weight
    assert isinstance(own, Tensor)
    if own.device.type != "cpu" or own.dtype not in (torch.float32, torch.float64):
        return line, "sparse layers run on the CPU in float32 or float64"
    form = Sparse.from_dense(weight)
    if layout == "sparse":
        return replace(line, layout="sparse"), "as asked"
    if form.density == 1:
        return line, "nothing was pruned"
    if x is None:
        return line, "not timed: no batch reached it"
    dense, sparse = copy_of(layer), in_form(layer, form)
    larger = nbytes(sparse) / nbytes(dense)
    if larger >= 1:
        return line, f"sparse would take {larger:.2f} times the bytes"
    slow, fast = (latency(one, x, repeats=_REPEATS).median for one in (dense, sparse))
    line = replace(line, dense_seconds=slow, new_seconds=fast)
    if fast < _FASTER * slow:
        return replace(line, layout="sparse"), f"{slow / fast:.1f} times as fast on {samples_in(x)} samples"
    return line, f"sparse would take {fast / slow:.2f} times as long"

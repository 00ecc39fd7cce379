"""New weights of a network of which channels or forms were chosen: the lockstep walk, or layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor
from torch.fx import Node

from pysolve.correlations import Array, Correlations, Indices, without_sums
from pysolve.errors import PysolveError
from pysolve.forms import Form
from pysolve.layer.layer_fit import LayerFit
from pysolve.methods.kinds.channels import ridge_fit
from pysolve.methods.menu import Chosen, Fit, Task
from pysolve.methods.study import Study, no_samples
from pysolve.methods.tasks import Left, cuts_of, left_of, names_of, shaped, task_of, values_of
from pysolve.methods.weights import weight_name
from pysolve.nn.batches.samples import first_samples, samples_in
from pysolve.nn.cut.bare import is_stack
from pysolve.nn.cut.norms import kept_of_norms
from pysolve.nn.cut.routers import chosen_by_routers
from pysolve.nn.cut.silenced import silenced
from pysolve.nn.cut.stacks import not_refitted, stack_inputs
from pysolve.nn.gathering.memory import give_back, room_for
from pysolve.nn.gathering.passes import MATRICES
from pysolve.nn.gathering.recurrent import bias_of
from pysolve.nn.graph.branches import Kept, Layer
from pysolve.nn.graph.export import where
from pysolve.nn.graph.mixtures import mixtures_in
from pysolve.nn.graph.sizes import usable
from pysolve.nn.layer_kinds import twins
from pysolve.nn.layer_matrix import channels, taps
from pysolve.nn.refit.layer_refit import Sampling
from pysolve.nn.refit.lockstep import refit
from pysolve.nn.running import Batch, as_array
from pysolve.nn.threads import all_blas_threads
from pysolve.plan import Site

REFITS = ("sequential", "independent", "bias", "none")
# Further fits of layers that a ReLU or the like follows, of channels and ranks. The second and third lower
# the divergence of LeNet-5's factors by 2.5 to 9 %, of ResNet-20 at half of its MACs by 3 %.
PASSES = 3
# Layers that a note names.
_NAMED = 3
# A bias that a layer did not have must lower its error by this share to earn its parameters.
BIAS_GAIN = 0.01


@dataclass(frozen=True, eq=False)
class Rebuilt:
    """New values of a network, in the original's shapes, and what the report tells of them.

    Parameters
    ----------
    chosen : Chosen
    values : {state-dict name: tensor}
        With the weights that take another form, multiplied out or decoded.
    fits : {layer or parameter: LayerFit}
        Of what was fitted last, on the channels that stay; without weights where these take no other form.
    samples : int
        That layers were fitted on.
    notes : tuple of str
    stacks : tuple of str
        Matrices in one parameter, of experts and recurrent layers, and biases that were refitted.
    """

    chosen: Chosen
    values: Mapping[str, Tensor] = field(default_factory=dict)
    fits: Mapping[str, LayerFit] = field(default_factory=dict)
    samples: int = 0
    notes: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()


def rebuild(
    study: Study, chosen: Chosen, refit: str = "sequential", *, passes: int = 1, stacks: bool = True
) -> Rebuilt:
    """Refit a network to what the original computes.

    Parameters
    ----------
    study : Study
    chosen : Chosen
    refit : "sequential", "independent", "bias" or "none"
        Layer after layer from the front, on the rebuilt network's inputs; every layer on the original's;
        biases alone, so that outputs keep their means; or weights that are left stay as they are.
    passes : int
        Further fits of layers that a ReLU follows, with targets that it leaves free.
    stacks : bool
        Whether matrices in one parameter are refitted, too: of experts that lose inputs, or other experts
        beside them, and of recurrent layers that lose inputs or hidden units.
    """
    if refit == "none" or study.calibration is None:
        return _plain(study, chosen)
    found = _fitted(study, chosen, refit, passes, stacks and refit == "sequential")
    return replace(found, notes=(*found.notes, *not_refitted(chosen.keep, found.stacks)))


def _fitted(study: Study, chosen: Chosen, refit: str, passes: int, stacks: bool) -> Rebuilt:
    """The network refitted in one of the ways that take data."""
    if refit == "independent" or study.graph is None:
        found = independent(study, chosen)
        why = (
            ()
            if refit == "independent" or chosen.fits
            else (_why_independent("the network cannot be exported"),)
        )
        return replace(found, notes=why)
    batches, reason = _batches(study, chosen)
    if not batches and chosen.fits:
        raise PysolveError(
            "the network's code takes batches of one size alone, and none is left whole without the samples "
            "that are held out: give more batches."
        )
    if not batches:
        return replace(independent(study, chosen), notes=(_why_independent(reason),))
    weights = refit == "sequential"
    moves = Sampling(passes=passes if weights else 0, seed=study.options.seed)
    return _walked(study, chosen, batches, reason, moves, weights=weights, stacks=stacks)


def independent(study: Study, chosen: Chosen) -> Rebuilt:
    """Every layer concerned on the original's inputs, as if the others stayed as they are."""
    state, left = study.model.state_dict(), left_of(study, chosen.keep)
    concerned = _concerned(study, chosen, left.cuts)
    fits = {name: _offline(study, left, name, fit) for name, fit in concerned.items()}
    values = silenced(study.model, chosen.keep)
    for name, found in fits.items():
        values |= values_of(study, state, left, name, found)
    assert study.calibration is not None
    return Rebuilt(chosen, values, fits, study.calibration.seen)


def changed_names(study: Study, chosen: Chosen) -> Iterator[str]:
    """State-dict names of what ``independent`` may change."""
    yield from silenced(study.model, chosen.keep)
    yield from kept_of_norms(chosen.keep)
    yield from chosen_by_routers(study.model, chosen.keep)
    for name in _concerned(study, chosen, cuts_of(chosen.keep, study.layers)):
        yield from names_of(study, name)


def forms_of(study: Study, rebuilt: Rebuilt) -> dict[str, Form]:
    """Forms of the weights that were given one, by their state-dict names, in the shapes of what stays."""
    found, left = dict[str, Form](), left_of(study, rebuilt.chosen.keep)
    for name, fit in rebuilt.fits.items():
        if name in rebuilt.chosen.fits and fit.form is not None:
            form = shaped(study, left, name, fit.form)
            if form is not None:
                found[weight_name(study.model, name)] = form
    return found


def _plain(study: Study, chosen: Chosen) -> Rebuilt:
    """Forms of the weights alone; nothing is refitted."""
    left, fits, values = left_of(study, chosen.keep), dict[str, LayerFit](), dict[str, Tensor]()
    state = study.model.state_dict()
    for name, fit in chosen.fits.items():
        fits[name] = fit(task_of(study, left, name).without_data())
        values |= values_of(study, state, left, name, replace(fits[name], bias=None))
    note = "nothing was refitted; errors and divergences of single sites are those with refits"
    return Rebuilt(chosen, values, fits, 0, (note,) if chosen.keep else ())


def _walked(
    study: Study,
    chosen: Chosen,
    batches: Sequence[Batch],
    reason: str,
    sampling: Sampling,
    *,
    weights: bool,
    stacks: bool,
) -> Rebuilt:
    """The lockstep walk: every layer on what the rebuilt network reads by now."""
    assert study.graph is not None
    assert study.calibration is not None
    state, left = study.model.state_dict(), left_of(study, chosen.keep)
    cuts, fits, values = left.cuts, dict[str, LayerFit](), silenced(study.model, chosen.keep)
    # What cannot be refitted on the way, and where refits of readers begin.
    apart = {name: fit for name, fit in chosen.fits.items() if not study.walks(name)}
    readers = _concerned(study, Chosen(chosen.keep), cuts)
    for name in readers:
        if not study.walks(name):
            values |= values_of(study, state, left, name, _offline(study, left, name, ridge_fit))
    gates = _gates_refitted(study, chosen.keep, state) if stacks and weights else {}
    values |= gates
    for name, fit in apart.items():
        fits[name] = _offline(study, left, name, fit)
        values |= values_of(study, state, left, name, fits[name])

    unseen: dict[str, None] = {}
    broken: dict[str, Node | None] = {}
    priors: dict[str, LayerFit] = {}

    def loses(name: str) -> bool:
        return name in cuts and len(cuts[name].inputs) < channels(study.layers[name].module)[0]

    def prepare(name: str) -> None:
        priors.clear()
        if name in readers:
            priors[name] = _offline(study, left, name, ridge_fit)

    def fitted(name: str, correlations: Correlations | None, intercept: bool) -> tuple[Array, Array | None]:
        known = study.correlations if correlations is None else {}
        previous = fits.get(name) if name in chosen.fits else None
        task = task_of(study, left, name, known, prior=priors.get(name), previous=previous)
        if correlations is not None:
            task = replace(task, correlations=correlations)
        elif task.correlations is None and (name in chosen.fits or loses(name)):
            unseen.update({name: None} if name not in broken else {})
        found = _fit_layer(study.layers[name], task, chosen.fits.get(name), intercept, weights)
        # Weights without a form of their own are in the values already, in half the bytes.
        bare = replace(found, weight=np.zeros((0, 0)), bias=None)
        fits[name] = found if name in chosen.fits else bare
        return found.weight, found.bias

    mixtures = mixtures_in(study.graph, study.model, chosen.keep, study.sites) if stacks else []
    given = {weight_name(study.model, name) for name in chosen.fits}
    # What takes another form is fitted layer by layer; and a bound on memory knows nothing of the hidden
    # values of all experts at once.
    able = study.options.memory is None
    mixtures = [
        one for one in mixtures if len(one.weights) == 1 or (able and not given.intersection(one.weights))
    ]
    together = [*gates]
    new = refit(
        study.graph,
        study.model,
        batches,
        cuts,
        fitted,
        values=values,
        new_biases=study.new_biases if chosen.keep else (),
        only=None if chosen.keep else {name for name in study.weights if study.walks(name)},
        always={name for name in chosen.fits if study.walks(name)},
        norms={**kept_of_norms(chosen.keep), **chosen_by_routers(study.model, chosen.keep)},
        mixtures=mixtures,
        prepare=prepare,
        told=broken.__setitem__,
        joined=together.extend,
        ranks=study.options.ranks,
        sampling=sampling,
        row_weights=study.row_weights(batches) if weights else {},
        progress=study.options.progress,
    )
    if study.options.memory is not None:
        give_back()
    used = sum(study.options.ranks.counts(sum(map(samples_in, batches))))
    seen = study.calibration.seen
    notes = (f"the refit used {used} of {seen} samples: {reason}",) if used < seen else ()
    unreached = (*([no_samples([*unseen])] if unseen else []), *_no_numbers(broken))
    return Rebuilt(chosen, new, fits, used, (*(notes if chosen.keep else ()), *unreached), tuple(together))


def _no_numbers(broken: Mapping[str, Node | None]) -> Iterator[str]:
    """What the report says of layers that read NaN or infinity where the original has numbers."""
    first = next((f" ({where(node)})" for node in broken.values() if node is not None), "")
    more = ", …" * (len(broken) > _NAMED)
    if broken:
        yield (
            f"for some samples the smaller network makes NaN or infinity of numbers{first}, the original "
            f"does not: no layer is fitted on these ({', '.join([*broken][:_NAMED])}{more})"
        )


def _gates_refitted(
    study: Study, keep: Mapping[Site, Indices], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Weights of recurrent layers that lose inputs or hidden units, and their biases, fitted on the others.

    To what the gates were, on the original's inputs and states. (Further fits on those of the compressed
    network, character models at half of their MACs: divergence of an LSTM 0.0868 → 0.0864, of two layers
    0.142 → 0.135 but the loss +0.208 → +0.211, of a GRU 0.161 → 0.159.)
    """
    gone: dict[str, list[Indices]] = {}
    for site, kept in keep.items():
        lost = np.setdiff1d(np.arange(site.channels), kept)
        for reader in filter(is_stack, site.readers):
            name = reader.partition(":")[0]
            if name in study.correlations:
                width = stack_inputs(study.model, reader)
                gone.setdefault(name, []).append(site.columns_of(reader, width)[lost].ravel())
    found = dict[str, Tensor]()
    for name, columns in gone.items():
        known = study.correlations[name]
        left = np.setdiff1d(np.arange(len(known.xx)), np.concatenate(columns))
        W = np.asarray(as_array(state[name]), np.float64)
        if not len(left) or known.vanishes:
            continue
        fit = _offline_fit(study, Task(name, W[:, left], known.restrict(left), np.arange(len(W))), ridge_fit)
        weight = np.zeros_like(W)
        weight[:, left] = fit.weight
        found |= values_of(study, state, Left(), name, replace(fit, weight=weight))
    return found


def _fit_layer(layer: Layer, task: Task, fit: Fit | None, intercept: bool, weights: bool) -> LayerFit:
    """One layer's new weights; a bias only where the layer may have one, a new one only where it pays."""
    fit = _threaded(fit or ridge_fit)
    if task.correlations is None or task.correlations.vanishes:
        return replace(fit(task.without_data()), bias=None)
    if not weights:
        M = fit(task.without_data()).weight
        bias = task.correlations.bias(M) if intercept else None
        return LayerFit(M, bias, task.correlations.share_lost(M, bias))
    bare = replace(task, correlations=without_sums(task.correlations))
    if not intercept:
        return replace(fit(bare), bias=None)
    found = fit(task)
    if layer.takes_bias:
        return found
    # Shares of what outputs vary, and of their energy.
    plain, known = replace(fit(bare), bias=None), task.correlations
    varies = known.energy - np.square(known.y_sum / known.count).sum()
    gained = found.error * varies < (1 - BIAS_GAIN) * plain.error * known.energy
    return found if gained else plain


def _offline(study: Study, left: Left, name: str, fit: Fit) -> LayerFit:
    """A layer on the original's inputs, of all its calls, with a bias only where it has one."""
    return _offline_fit(study, task_of(study, left, name), fit)


def _offline_fit(study: Study, task: Task, fit: Fit) -> LayerFit:
    """A fit to what is known, with a bias only where there is one."""
    layer, fit = study.layers.get(task.name), _threaded(fit)
    if task.correlations is None or task.correlations.vanishes:
        return replace(fit(task.without_data()), bias=None)
    if bias_of(study.model, task.name) is not None if layer is None else layer.takes_bias:
        return fit(task)
    return replace(fit(replace(task, correlations=without_sums(task.correlations))), bias=None)


def _threaded(fit: Fit) -> Fit:
    """A fit that takes several threads where it is long."""

    def fitted(task: Task) -> LayerFit:
        h, d = task.weight.shape
        # A factorisation, and two products of a system's size for the outputs.
        with all_blas_threads(d * d * (d / 6 + 2 * h)):
            return fit(task)

    return fitted


def _concerned(study: Study, chosen: Chosen, cuts: Mapping[str, Kept]) -> dict[str, Fit]:
    """Fits of the layers that lose inputs, where the original's are known, or take another form."""
    found: dict[str, Fit] = {}
    shared = twins(study.model)
    for name, cut in cuts.items():
        # A weight that serves others as well cannot follow what this layer reads.
        able = name in study.correlations and study.layers[name].module not in shared
        if able and len(cut.inputs) < channels(study.layers[name].module)[0]:
            found[name] = ridge_fit
    return {**found, **chosen.fits}


def _batches(study: Study, chosen: Chosen) -> tuple[list[Batch], str]:
    """Batches for the refit, and why they are not all that were seen."""
    assert study.graph is not None
    assert study.calibration is not None
    kept = study.calibration.kept
    empty = [str(rank) for rank, count in enumerate(study.options.ranks.counts(len(kept))) if not count]
    if empty and study.options.ranks.size > 1:
        raise PysolveError(
            f"process {' and '.join(empty)} of the group has no samples for the refit: give each its batches."
        )
    bound, ranks = study.options.memory, study.options.ranks
    if bound is not None:
        # Copies of the network were made since sums were gathered, and new weights will be on the way.
        widths = (taps(one.module) * channels(one.module)[0] for one in study.layers.values())
        working = MATRICES * 8 * max(widths, default=0) ** 2
        changed = study.layers if chosen.keep else {name for name in chosen.fits if study.walks(name)}
        working += sum(study.layers[name].module.weight.nbytes for name in changed)
        room = min(ranks.all(room_for(study.graph, max(0, bound.left() - working))))
        kept = kept if room >= sum(map(samples_in, kept)) else first_samples(kept, room)
    batches = usable(study.graph, kept)
    if batches is kept:
        return kept, "more would not fit in memory"
    return batches, "the network's code takes batches of one size alone"


def _why_independent(reason: str) -> str:
    return f"{reason}, so its readers were refitted independently"

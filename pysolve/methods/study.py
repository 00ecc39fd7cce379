"""What is known of a network before anything is chosen; it can be saved, loaded and added up."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from weakref import WeakKeyDictionary

import numpy as np
from torch import Tensor, nn

from pysolve.correlations import AnyArray, Array, Correlations
from pysolve.errors import PysolveError, path_of
from pysolve.methods.goal import Options
from pysolve.methods.weights import Skipped
from pysolve.nn.batches.samples import first_samples, moved
from pysolve.nn.cut.bare import is_stack
from pysolve.nn.cut.stacks import stack_inputs
from pysolve.nn.files.study_file import check_network, read_study, write_study
from pysolve.nn.files.sums_folder import network_checksums
from pysolve.nn.gathering.calibration import Calibration
from pysolve.nn.graph.branches import Layer
from pysolve.nn.graph.export import Graph
from pysolve.nn.layer_matrix import channels, matrix
from pysolve.nn.layers.attention import opened
from pysolve.nn.plain import plain_network
from pysolve.nn.refit.row_weights import RowWeights, row_weights
from pysolve.nn.running import (
    Batch,
    as_array,
    device_of,
)
from pysolve.plan import Site


@dataclass(frozen=True, eq=False)
class Turn:
    """What makes a user's network into the equal one that is compressed.

    Parameters
    ----------
    before : Study
        Of the user's network.
    values : {state-dict name: array}
    untied : tuple of str
        Tensors that do not share their values with others any more.
    sites : tuple of Site
        Whose channels are axes, those that matter most first.
    outputs : {writer: (h, h) array}
        T, of outputs T y in the place of y; of streams alone, where T is orthogonal.
    """

    before: Study
    values: Mapping[str, AnyArray] = field(default_factory=dict)
    untied: tuple[str, ...] = ()
    sites: tuple[Site, ...] = ()
    outputs: Mapping[str, Array] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Study:
    """What is known of a network.

    Parameters
    ----------
    model : nn.Module
        The original; never changed.
    options : Options
    graph : Graph, optional
        None where there are no data, or the network cannot be exported.
    layers : {name: Layer}
        Linear layers and ungrouped convolutions, with what the graph shows around them.
    weights : {name: tensor}
        Weights that may take another form: of layers, by the layer's name, and bare parameters by their own.
    sites : sequence of Site
    correlations : {layer: Correlations}
    calibration : Calibration, optional
        None without data.
    left : tuple of Skipped
        Weights that take no other form.
    notes : tuple of str
    seconds : {stage: float}
    turn : Turn, optional
        Where ``model`` is an equal network in the place of the user's.
    weighed : {network: {layer: tensors}}
        What ``row_weights`` has found, of all networks that came of this study.
    """

    model: nn.Module
    options: Options
    graph: Graph | None = None
    layers: Mapping[str, Layer] = field(default_factory=dict)
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    sites: Sequence[Site] = ()
    correlations: Mapping[str, Correlations] = field(default_factory=dict)
    calibration: Calibration | None = None
    left: tuple[Skipped, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    turn: Turn | None = None
    weighed: WeakKeyDictionary[nn.Module, RowWeights] = field(default_factory=WeakKeyDictionary, repr=False)

    def __reduce__(self) -> str:
        raise TypeError("a study is neither copied nor pickled: save writes it to a file, load reads that.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write correlations and samples to one ``.safetensors`` file, which needs no data any more.

        Raises
        ------
        PysolveError
            Nothing was gathered, or batches hold objects that no file holds.
        """
        write_study(path_of("path", path), self.model, self._gathered, self.correlations)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module) -> Study:
        """The study in a file, of this network; correlations are read when they are needed.

        Raises
        ------
        DataError
            The file is another one, or damaged.
        PysolveError
            It is of another network, or of other weights.
        """
        network = opened(plain_network(model))
        calibration, correlations = read_study(path_of("path", path), network)
        return cls(network, Options(), correlations=correlations, calibration=calibration)

    def __add__(self, other: Study) -> Study:
        """A study of the samples of both, of the same network: from several machines, for example."""
        if not isinstance(other, Study):
            return NotImplemented
        if other.model is not self.model:
            check_network(network_checksums(self.model), other.model, "the other study")
        parts = [self.correlations, other.correlations]
        both = {
            name: Correlations.merge(part[name] for part in parts if name in part)
            for name in {**parts[0], **parts[1]}
        }
        return Study(self.model, Options(), correlations=both, calibration=self._gathered + other._gathered)

    def __iter__(self) -> Iterator[Batch]:
        """The samples that are kept for refits, in batches."""
        return iter(self._gathered.kept)

    def __repr__(self) -> str:
        seen = 0 if self.calibration is None else self.calibration.seen + self.calibration.out
        return f"Study({type(self.model).__name__}, {len(self.correlations)} layers, {seen} samples)"

    @property
    def _gathered(self) -> Calibration:
        if self.calibration is None:
            raise PysolveError("this study was made without batches: nothing was gathered.")
        return self.calibration

    @property
    def free(self) -> list[Site]:
        """Sites that can shrink."""
        return [site for site in self.sites if site.pinned is None]

    @property
    def original(self) -> nn.Module:
        """The user's network."""
        return self.model if self.turn is None else self.turn.before.model

    @property
    def held(self) -> list[Batch]:
        """The selection set: samples that no fit has seen, on which sizes are chosen."""
        return [] if self.calibration is None else self.calibration.held

    def first_kept(self, count: int) -> list[Batch]:
        """The first samples of the refit, of all processes."""
        own = first_samples(self._gathered.kept, count)
        turns = zip_longest(*self.options.ranks.all(own))
        home = device_of(self.model)
        every = [moved(batch, home) for turn in turns for batch in turn if batch is not None]
        return first_samples(every, count)

    @property
    def apart(self) -> list[Batch]:
        """Samples that neither a fit nor a choice has seen, for the report."""
        return [] if self.calibration is None else self.calibration.apart

    @property
    def new_biases(self) -> frozenset[str]:
        """Layers without a bias that may be given one: those that can lose inputs."""
        if not self.options.new_biases:
            return frozenset()
        readers = {self.layers[name] for site in self.free for name in site.readers if name in self.layers}
        return frozenset(layer.name for layer in readers if layer.calls == 1 and not layer.takes_bias)

    def walks(self, name: str) -> bool:
        """Whether a layer can be refitted on the way through the graph, or without one on what is known."""
        layer = self.layers.get(name)
        return layer is not None and (layer.calls == 1 if self.graph else name in self.correlations)

    def fits(self, name: str) -> bool:
        """Whether a layer can be fitted to data: on the way, or on what all of its calls read."""
        return self.walks(name) or name in self.correlations

    def row_weights(self, batches: Sequence[Batch]) -> RowWeights:
        """What the rows of layers' outputs weigh in fits; the same for all fits of a network."""
        assert self.graph is not None
        if self.model not in self.weighed:
            options, least = self.options, 2 if self.options.memory is None else 1
            self.weighed[self.model] = row_weights(
                self.graph, self.model, batches, seed=options.seed, ranks=options.ranks, least=least
            )
        return self.weighed[self.model]

    def matrix(self, name: str) -> Array:
        """A weight as the matrix M of  y = M x + b, in double precision; else its ``flatten(1)``."""
        if name in self.layers:
            return np.asarray(matrix(self.layers[name].module).double().cpu().numpy())
        return np.asarray(as_array(self.weights[name].flatten(1)), np.float64)


def no_samples(names: Sequence[str]) -> str:
    """What becomes of layers whose inputs nothing is known of, for the report."""
    return (
        f"no sample reached {', '.join(names)}: nothing is fitted there, and weights stay as they are or are "
        "pruned and rounded by themselves"
    )


def widths(study: Study, site: Site) -> dict[str, int]:
    """Input channels of a site's readers."""
    stacks = {name: stack_inputs(study.model, name) for name in site.readers if is_stack(name)}
    return {n: stacks[n] if n in stacks else channels(study.layers[n].module)[0] for n in site.readers}


class Clock:
    """Seconds that stages took, one after the other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def stage(self, name: str) -> None:
        """Write down what has passed since the last stage."""
        now = time.perf_counter()
        self.seconds[name], self.last = self.seconds.get(name, 0.0) + now - self.last, now

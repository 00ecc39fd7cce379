"""Plans: the channels to remove from a network, its new values, and the forms of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from pysolve.correlations import AnyArray, all_but
from pysolve.correlations import Array as Array
from pysolve.correlations import Indices as Indices
from pysolve.errors import whole
from pysolve.forms import Form

# Order of a member of a site whose first dimension counts experts: "experts.down_proj:e", "experts:e".
EXPERTS = "e"
# Sites that a plan names at a prompt.
_SHOWN = 4


@dataclass(frozen=True)
class Norm:
    """A norm over all channels of a site:  gain · x / √(mean x² + ε),  gain = weight + offset.

    Of D channels the d that are left are scaled as if the others were zero, by the gain times √(D / d) and ε
    times D / d. Where the norm is ``centred``, as layer norms are, the mean of those that are left is taken
    off first.

    Parameters
    ----------
    weight : str
        State-dict name of its weight.
    epsilon : str
        Path of the attribute that holds ε.
    offset : float
        What the code adds to the weight.
    centred : bool
    """

    weight: str
    epsilon: str
    offset: float = 0.0
    centred: bool = False

    @property
    def layer(self) -> str:
        """The module that holds its weight."""
        return self.weight.rpartition(".")[0]

    @property
    def inside(self) -> Norm:
        """The same inside of what runs it over channels that stay."""
        _, _, leaf = self.epsilon.rpartition(".")
        weight = self.weight.rpartition(".")[2]
        names = tensor_name(self.layer, f"norm.{weight}"), tensor_name(self.layer, f"norm.{leaf}")
        return replace(self, weight=names[0], epsilon=names[1])


@dataclass(frozen=True, eq=False)
class Attention:
    """Heads whose dimensions are the channels of a site:  softmax(s · q kᵀ) v  in each of H heads.

    Of d dimensions that become d', the scale s of the scores stays what it is: where it follows the size of a
    head, queries are multiplied by √(d' / d).

    Parameters
    ----------
    query, key, value : str
        Layers that make them, which may be one.
    output : str
        Layer that reads the heads' results.
    queries, outputs : (H, d) int array
        Output channels of the first layer, and input channels of the last, by head and dimension.
    keys, values : (G, d) int array
        Output channels of the layers between; H / G heads in a row share them.
    scale : str, optional
        Path of the attribute that holds 1/√d; "" where the code takes it from sizes; None where the scale
        does not follow the size of a head.
    """

    query: str
    key: str
    value: str
    output: str
    queries: Indices
    keys: Indices
    values: Indices
    outputs: Indices
    scale: str | None = None


@dataclass(frozen=True)
class Branch:
    """What is left of a residual branch none of whose channels stays, of  x + f(x)  a constant:  x + b.

    Parameters
    ----------
    norms : {reader: str}
        Batch norms right behind readers: what they make of the reader's bias is the constant.
    idle : tuple of str
        Further layers whose results nothing reads then, such as the norm in front of the branch.
    written : bool
        Whether the network's code writes into the constant, as  out += x  does.
    whole : str
        Module that does not run at all then, for its code takes no fewer than one channel: attention.
    argument : int or str
        The one of its arguments, by position or keyword, whose shape its result has.
    results, position : int
        How many results it has, 0 where it returns one tensor and no tuple, and which of them is the
        constant; the others are None.
    """

    norms: Mapping[str, str] = field(default_factory=dict)
    idle: tuple[str, ...] = ()
    written: bool = False
    whole: str = ""
    argument: int | str = 0
    results: int = 0
    position: int = 0


@dataclass(frozen=True, eq=False)
class Site:
    """A set of channels that can shrink: which layers make them, pass them on and read them.

    A channel here is whatever must be removed together: one feature map, one neuron, one attention head, one
    dimension of all heads, one group of a grouped convolution. ``rows`` and ``columns`` give its indices in
    each layer; a layer that they do not name has its channels in order, in equal consecutive blocks.

    Parameters
    ----------
    channels : int
        How many there are now.
    writers, readers : tuple of str
        Names of the layers whose output channels these are, and of the layers that read them.
    passed : tuple of str
        Layers in between that lose the same channels: batch norms, depthwise convolutions, zero padding.
    rows : {writer or passed layer: (channels, r) int array}
        Output channels of that layer that belong to each channel of the site. A padding layer counts only
        the channels that it adds, those in front first; the ones inside pass without it.
    columns : {reader: (channels, c) int array}
        Input channels of that layer that belong to each channel of the site: one for a convolution, height ×
        width of them for a Linear after a flatten.
    pinned : str, optional
        Why these channels cannot be removed; None when they can.
    integers : {path of an attribute: int}
        Integers in modules that count these channels, such as ``"block.heads"`` or, in a tuple,
        ``"1.unflattened_size.0"``, and how much of them one channel is: they shrink with the channels.
    norms : tuple of Norm
        Norms over all of these channels, as of the stream of a decoder.
    least : int
        Channels that must stay: as many experts as each token goes to; none where the site has a branch.
    branch : Branch, optional
        Where readers without these channels give a constant which is added to what goes past them: what
        becomes of the network's modules then.
    attention : tuple of Attention
        Heads whose dimensions these channels are.
    """

    channels: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    passed: tuple[str, ...] = ()
    rows: Mapping[str, Indices] = field(default_factory=dict, repr=False)
    columns: Mapping[str, Indices] = field(default_factory=dict, repr=False)
    pinned: str | None = None
    integers: Mapping[str, int] = field(default_factory=dict, repr=False)
    norms: tuple[Norm, ...] = field(default=(), repr=False)
    least: int = 1
    branch: Branch | None = None
    attention: tuple[Attention, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        whole("channels", self.channels, 0)
        for what in ("writers", "readers", "passed"):
            if isinstance(names := getattr(self, what), str):
                raise TypeError(
                    f"{what} must be a tuple of names, got the string {names!r}: pass ({names!r},)."
                )
            object.__setattr__(self, what, tuple(names))
        if self.least < 1 and self.branch is None:
            raise ValueError("a site all of whose channels can go (least=0) needs a Branch.")
        for what, members in (("rows", (*self.writers, *self.passed)), ("columns", self.readers)):
            given = {name: np.asarray(table, dtype=np.intp) for name, table in getattr(self, what).items()}
            object.__setattr__(self, what, given)
            for name, table in given.items():
                if name not in members:
                    raise ValueError(f"{what} names {name!r}, which is none of {members}.")
                if table.ndim != 2 or len(table) != self.channels or len(np.unique(table)) != table.size:
                    raise ValueError(
                        f"{what} of {name} must give each of the {self.channels} channels equally many "
                        f"indices of its own, got an array of shape {table.shape}."
                    )

    def __eq__(self, other: object) -> bool:
        """Whether it is the same channels of the same layers, found at another time perhaps."""
        if not isinstance(other, Site):
            return NotImplemented
        return self is other or (
            self._layers == other._layers
            and _same_tables(self.rows, other.rows)
            and _same_tables(self.columns, other.columns)
        )

    def __hash__(self) -> int:
        return hash(self._layers)

    @property
    def _layers(self) -> tuple[object, ...]:
        return self.channels, self.writers, self.readers, self.passed

    @property
    def name(self) -> str:
        """Its name in tables and errors: writers → readers, only the first of many."""
        return f"{_first(self.writers)} → {_first(self.readers)}" + ", in each head" * bool(self.attention)

    @property
    def width(self) -> int:
        """Output channels of its first writer that are in it, however they belong together."""
        table = self.rows.get(next(iter(self.writers), ""))
        return self.channels if table is None else table.size

    @property
    def router(self) -> str | None:
        """State-dict name of the weight whose rows choose these channels, where they are whole experts."""
        if not any(map(of_experts, self.readers)):
            return None
        first = self.writers[0]
        return owner(first) if of_experts(first) else weight_name(first)

    @property
    def makers(self) -> list[tuple[str, str]]:
        """Role and name of what makes or passes channels that no reader hears alone: norms or scores do."""
        scored = {name for one in self.attention for name in (one.query, one.key)}
        if scored:
            return [("writers", name) for name in self.writers if name in scored]
        weights = {norm.weight for norm in self.norms if not norm.centred}
        roles = (("writers", self.writers), ("passed", self.passed))
        passes = {*weights, *(weight.removesuffix(".weight") for weight in weights)}
        return [(role, name) for role, names in roles for name in names if weights and name not in passes]

    def overlaps(self, other: Site) -> bool:
        """Whether a reader would lose some inputs for either site, as for heads and their dimensions."""
        shared = self.columns.keys() & other.columns.keys()
        return any(np.intersect1d(self.columns[name], other.columns[name]).size for name in shared)

    def rows_of(self, layer: str, width: int) -> Indices:
        """(channels, r) output channels of a writer or a passed layer that is ``width`` channels wide."""
        return self._table(self.rows, layer, width)

    def columns_of(self, layer: str, width: int) -> Indices:
        """(channels, c) input channels of a reader that is ``width`` channels wide."""
        return self._table(self.columns, layer, width)

    def _table(self, tables: Mapping[str, Indices], layer: str, width: int) -> Indices:
        if layer in tables:
            return tables[layer]
        if not self.channels or width % self.channels:
            raise ValueError(
                f"{layer} has {width} channels, which are no multiple of the site's {self.channels}."
            )
        return np.arange(width).reshape(self.channels, -1)


@dataclass(frozen=True, eq=False)
class Collapse:
    """Keep only some channels of a site, and optionally give its readers new weights for them.

    Parameters
    ----------
    site : Site
    keep : (k,) int array
        Kept channels, ascending.
    weights : {reader: (h, k) array}
        New weights of a reader on the kept channels, as a matrix of one row an output; a reader not named
        keeps its old columns. For readers all of whose inputs belong to the site; a channel of c inputs, or
        of taps, has as many columns in a row.
    biases : {reader: (h,) array}
        New biases; a reader not named keeps its old one, or none.
    """

    site: Site
    keep: Indices
    weights: Mapping[str, Array] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        keep = np.asarray(self.keep, dtype=np.intp)
        object.__setattr__(self, "keep", keep)
        if keep.ndim != 1 or np.any(np.diff(keep) <= 0):
            raise ValueError("keep must list channel indices in ascending order, each once.")
        if keep.size and not 0 <= keep[0] <= keep[-1] < self.site.channels:
            raise ValueError(
                f"keep must lie within 0 … {self.site.channels - 1}, got {keep[0]} … {keep[-1]}."
            )
        strangers = (set(self.weights) | set(self.biases)) - set(self.site.readers)
        if strangers:
            raise ValueError(f"{sorted(strangers)} do not read these channels; readers: {self.site.readers}.")

    def __repr__(self) -> str:
        return f"Collapse({self.site.name!r}, keeps {len(self.keep)} of {self.site.channels})"

    @cached_property
    def removed(self) -> Indices:
        """Removed channels, ascending."""
        return all_but(self.site.channels, self.keep)


@dataclass(frozen=True)
class Plan:
    """Everything that turns a network into its smaller version.

    Parameters
    ----------
    steps : tuple of Collapse
        All refer to the original network, so a layer may read one site and write another.
    values : {state-dict name: array}
        New parameters and buffers in the shapes that they have in the original network; what belongs to
        removed channels is dropped with them. A bias may be given to a layer that has none.
    forms : {state-dict name: Sparse, LowRank, Codebook or Integers}
        Tensors in another form, of the shapes that they have after the steps. A layer whose ``weight`` is
        Sparse, LowRank or Integers runs in that form, and so does a recurrent layer with a LowRank weight; a
        Codebook may be any tensor's, and its decoded values take the tensor's place. An embedding's LowRank
        serves the layers that share its weight as well.
    untied : tuple of str
        Tensors that get values of their own, first of all, where they share those of another layer.
    """

    steps: tuple[Collapse, ...] = ()
    values: Mapping[str, AnyArray] = field(default_factory=dict)
    forms: Mapping[str, Form] = field(default_factory=dict)
    untied: tuple[str, ...] = ()

    def __repr__(self) -> str:
        sites = ", ".join(map(repr, self.steps[:_SHOWN])) + ", …" * (len(self.steps) > _SHOWN)
        return f"Plan(steps=({sites}), {len(self.values)} values, {len(self.forms)} forms)"


def check_listed(sites: object) -> None:
    """TypeError for what is no list of sites."""
    if isinstance(sites, Site):
        raise TypeError("sites must be a list of Site, got one: pass [site].")
    if isinstance(sites, str) or not isinstance(sites, Iterable):
        raise TypeError(f"sites must be a list of Site, got {sites!r}; names of layers are no sites.")
    strangers = [type(site).__name__ for site in sites if not isinstance(site, Site)]
    if strangers:
        raise TypeError(f"sites must be a list of Site, got a {strangers[0]} in it.")


def tensor_name(layer: str, leaf: str) -> str:
    """State-dict name of a layer's tensor; the network's own name is empty."""
    return f"{layer}.{leaf}" if layer else leaf


def weight_name(layer: str) -> str:
    """State-dict name of a layer's weight."""
    return tensor_name(layer, "weight")


def _same_tables(some: Mapping[str, Indices], others: Mapping[str, Indices]) -> bool:
    return some.keys() == others.keys() and all(np.array_equal(some[name], others[name]) for name in some)


def of_experts(name: str) -> bool:
    """Whether a member of a site is one whose first dimension counts experts."""
    return name.endswith(f":{EXPERTS}")


def owner(name: str) -> str:
    """The parameter or module of a member that counts experts."""
    return name.removesuffix(f":{EXPERTS}")


def _first(names: tuple[str, ...]) -> str:
    return names[0] + f" (+{len(names) - 1})" * (len(names) > 1) if names else "nothing"

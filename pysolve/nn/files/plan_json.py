"""Plans as JSON, and back from untrusted JSON."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from pysolve.correlations import Indices
from pysolve.errors import DataError
from pysolve.forms import Codebook, Form, Integers, LowRank
from pysolve.plan import Attention, Branch, Collapse, Norm, Plan, Site

# From "rows" or "columns" and a layer's name to how many output or input channels it has.
Width = Callable[[str, str], int]
T = TypeVar("T")
_RANGES = re.compile(r"[0-9]{1,10}(-[0-9]{1,10})?( [0-9]{1,10}(-[0-9]{1,10})?)*")
# Most results that a module which is passed by returns.
_RESULTS = 100
# Tables of heads, and the layers that they are of.
_TABLES = {"queries": "query", "keys": "key", "values": "value", "outputs": "output"}
_KINDS = {dict: "an object", list: "a list", str: "a string", int: "an integer", bool: "true or false"}


def plain(value: object) -> object:
    """Numbers, strings, lists and dictionaries that JSON can hold; numbers that are not finite are None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value) if math.isfinite(value) else None
    raise TypeError(f"a report holds numbers and strings, got {type(value).__name__}.")


def ranges(indices: npt.ArrayLike) -> str:
    """Indices in their order, neighbours together: [0, 1, 2, 7, 4, 5] is "0-2 7 4-5"."""
    flat = np.asarray(indices, dtype=np.intp).ravel()
    starts = np.flatnonzero(np.diff(flat, prepend=-2) != 1)
    ends = np.append(starts[1:], len(flat)) - 1 if len(flat) else starts
    pairs = zip(flat[starts].tolist(), flat[ends].tolist(), strict=True)
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in pairs)


def indices_of(text: object, limit: int, what: str) -> Indices:
    """At most ``limit`` indices below it from "0-2 7 4-5", counted before any is made; else DataError."""
    # Matching takes memory for every part, so there may not be more than the indices that could be meant.
    if not isinstance(text, str) or text.count(" ") > limit or (text and not _RANGES.fullmatch(text)):
        raise DataError(f'expected {what} as indices such as "0-2 7", got {str(text)[:40]!r}.')
    pairs = [tuple(map(int, part.split("-"))) for part in text.split()]
    parts = [(pair[0], pair[-1] + 1) for pair in pairs]
    count = sum(end - start for start, end in parts)
    if any(not start < end <= limit for start, end in parts) or count > limit:
        raise DataError(f"expected {what} within 0 … {limit - 1}, each once, got {text[:40]!r}.")
    return np.concatenate([np.arange(*part) for part in parts]) if parts else np.zeros(0, np.intp)


def step_record(step: Collapse) -> dict[str, object]:
    """A step without its values: its site and its kept channels."""
    site = step.site
    return {
        "keep": ranges(step.keep),
        "channels": site.channels,
        "writers": [*site.writers],
        "readers": [*site.readers],
        "passed": [*site.passed],
        "rows": {name: ranges(table) for name, table in site.rows.items()},
        "columns": {name: ranges(table) for name, table in site.columns.items()},
        **({"integers": dict(site.integers)} if site.integers else {}),
        **({"norms": [[*vars(one).values()] for one in site.norms]} if site.norms else {}),
        **({"attention": [*map(_attention_record, site.attention)]} if site.attention else {}),
        **({"branch": _branch_record(site.branch)} if site.branch and not len(step.keep) else {}),
    }


def _attention_record(one: Attention) -> dict[str, object]:
    """Layers of heads, and their rows head by head."""
    tables = {name: ranges(getattr(one, name)) for name in _TABLES}
    layers = {name: getattr(one, name) for name in _TABLES.values()}
    return {**layers, **tables, "groups": len(one.keys), "heads": len(one.queries), "scale": one.scale}


def _branch_record(branch: Branch) -> dict[str, object]:
    """What goes with a branch of which no channel is kept."""
    return {**vars(branch), "norms": dict(branch.norms), "idle": [*branch.idle]}


def plan_record(plan: Plan) -> dict[str, object]:
    """A plan without its numbers: kept channels of each site, names of new values, forms of tensors."""
    return {
        "steps": [step_record(step) for step in plan.steps],
        "values": [*plan.values],
        "forms": {name: form_record(form) for name, form in plan.forms.items()},
        **({"untied": [*plan.untied]} if plan.untied else {}),
    }


def form_record(form: Form) -> dict[str, object]:
    """A form without its numbers; DataError for factors that divide the kernel as no record can describe."""
    if isinstance(form, LowRank):
        *before, spatial = [False, *(size > 1 for size in form.outer.shape[2:])]
        if any(before):
            raise DataError(
                "expected factors with the kernel first, or along the last dimension in the outer one, got "
                f"{form.outer.shape} and {form.inner.shape}."
            )
        apart = {"exact": len(form.rows)} if len(form.rows) else {}
        return {"kind": "low-rank", "rank": form.rank, "spatial": spatial, **apart}
    if isinstance(form, Integers):
        return {"kind": "int", "bits": form.bits, "group": form.group, "dynamic": form.dynamic}
    if isinstance(form, Codebook):
        return {"kind": "codebook", "values": len(form.centroids)}
    return {"kind": "csr", "density": form.density}


def factors_of(records: object) -> dict[str, tuple[int, bool, int]]:
    """Rank of each factored layer, whether it lies along height and width, and its rows that stay exact."""
    found = {}
    for name, record in typed(records, dict, "factored").items():
        given = typed(record, dict, "a factored layer")
        rank = typed(field(given, "rank"), int, "rank")
        if rank < 1:
            raise DataError(f"expected a rank of at least 1, got {rank}.")
        exact = typed(given.get("exact", 0), int, "exact")
        if exact < 0:
            raise DataError(f"expected a number of rows that stay exact, got {exact}.")
        found[name] = (rank, typed(field(given, "spatial"), bool, "spatial"), exact)
    return found


def steps_of(records: object, width: Width) -> tuple[Collapse, ...]:
    """Steps from their records, for a network whose layers have these widths; else DataError.

    Together the steps may cut each channel of a layer once, so that no more is made of a file than the
    network is wide.
    """
    spent: dict[tuple[str, str], int] = {}
    return tuple(
        _step(typed(record, dict, "a step"), width, spent) for record in typed(records, list, "steps")
    )


def typed(value: object, kind: type[T], what: str) -> T:
    """The value, if it is of exactly this type; else DataError."""
    if type(value) is not kind:
        got = _KINDS.get(type(value), "null" if value is None else "a number")
        raise DataError(f"expected {what} to be {_KINDS[kind]}, got {got}.")
    return value


def strings(value: object, what: str) -> list[str]:
    """The value, if it is a list of strings; else DataError."""
    return [typed(item, str, f"every part of {what}") for item in typed(value, list, what)]


def field(record: Mapping[str, object], name: str) -> object:
    """A field that must be there; else DataError."""
    if name not in record:
        raise DataError(f"expected a field {name!r}, got {', '.join(record)[:80] or 'none'}.")
    return record[name]


def _step(record: dict[str, object], width: Width, spent: dict[tuple[str, str], int]) -> Collapse:
    channels = typed(field(record, "channels"), int, "channels")
    writers, readers, passed = (
        tuple(strings(field(record, role), role)) for role in ("writers", "readers", "passed")
    )
    members = {"rows": {*writers, *passed}, "columns": {*readers}}
    tables: dict[str, dict[str, Indices]] = {}
    most = 0
    for what, layers in members.items():
        given = typed(field(record, what), dict, what)
        tables[what] = {name: _table(given[name], channels, width(what, name), what) for name in given}
        for name in sorted(layers):
            limit = width(what, name)
            size = tables[what][name].size if name in given else limit
            most = max(most, size)
            spent[what, name] = spent.get((what, name), 0) + size
            if spent[what, name] > limit:
                raise DataError(f"several steps cut the same {what} of {name}.")
    if not 1 <= channels <= most:
        raise DataError(f"expected a site of 1 … {most} channels, got {channels}.")
    keep = indices_of(field(record, "keep"), channels, "keep")
    counts = typed(record.get("integers", {}), dict, "integers")
    integers = {typed(path, str, "a path"): typed(each, int, "a count") for path, each in counts.items()}
    norms = tuple(_norm(one) for one in typed(record.get("norms", []), list, "norms"))
    rows, columns = tables["rows"], tables["columns"]
    heads = typed(record.get("attention", []), list, "attention")
    branch = None if len(keep) or "branch" not in record else _branch(record["branch"])
    try:
        site = Site(
            channels,
            writers,
            readers,
            passed,
            rows,
            columns,
            integers=integers,
            norms=norms,
            least=1 if branch is None else 0,
            branch=branch,
            attention=tuple(_attention(one, width, tables) for one in heads),
        )
        return Collapse(site, keep)
    except ValueError as error:
        raise DataError(str(error)) from error


def _branch(record: object) -> Branch:
    given = typed(record, dict, "a branch")
    norms = typed(field(given, "norms"), dict, "norms")
    argument = field(given, "argument")
    if type(argument) is not int and type(argument) is not str:
        raise DataError(f"expected the number or the name of an argument, got {argument!r}.")
    results, position = (typed(field(given, name), int, name) for name in ("results", "position"))
    if not 0 <= position < max(1, results) <= _RESULTS:
        raise DataError(f"expected one of up to {_RESULTS} results, got number {position} of {results}.")
    return Branch(
        {typed(name, str, "a reader"): typed(norm, str, "a norm") for name, norm in norms.items()},
        tuple(strings(field(given, "idle"), "idle")),
        typed(field(given, "written"), bool, "written"),
        typed(field(given, "whole"), str, "whole"),
        argument,
        results,
        position,
    )


def _attention(record: object, width: Width, tables: Mapping[str, Mapping[str, Indices]]) -> Attention:
    given = typed(record, dict, "attention")
    names = {name: typed(field(given, name), str, name) for name in _TABLES.values()}
    scale = field(given, "scale")
    found = {}
    for what, layer in _TABLES.items():
        side, name = "columns" if layer == "output" else "rows", names[layer]
        if name not in tables[side]:
            raise DataError(f"expected {what} of heads in a layer of the site, got {name!r}.")
        table = indices_of(field(given, what), width(side, name), what)
        count = typed(
            field(given, "groups" if layer in ("key", "value") else "heads"), int, "a number of heads"
        )
        if not np.isin(table, tables[side][name]).all():
            raise DataError(f"expected {what} of heads among the site's {side} of {name}.")
        found[what] = _shaped(table, count, what)
    shapes = (
        {found[what].shape for what in ("queries", "outputs")},
        {found[w].shape for w in ("keys", "values")},
    )
    if any(len(one) > 1 for one in shapes) or len({one.shape[1] for one in found.values()}) > 1:
        raise DataError("expected heads of one size.")
    if len(found["queries"]) % len(found["keys"]):
        raise DataError("expected as many heads for each group of keys.")
    query, key, value, output = names.values()
    queries, keys, values, outputs = found.values()
    own = None if scale is None else typed(scale, str, "a scale")
    return Attention(query, key, value, output, queries, keys, values, outputs, own)


def _shaped(table: Indices, heads: int, what: str) -> Indices:
    if heads < 1 or not len(table) or len(table) % heads:
        raise DataError(f"expected {what} of equally many dimensions for each of {heads} heads.")
    return table.reshape(heads, -1)


def _norm(record: object) -> Norm:
    weight, epsilon, offset, centred = [*typed(record, list, "a norm"), *[None] * 4][:4]
    if type(offset) is not float or not math.isfinite(offset):
        raise DataError(f"expected a norm to add a number to its weight, got {offset!r}.")
    names = typed(weight, str, "a norm's weight"), typed(epsilon, str, "a norm's epsilon")
    return Norm(*names, offset, typed(centred, bool, "a norm's kind"))


def _table(text: object, channels: int, limit: int, what: str) -> Indices:
    table = indices_of(text, limit, what)
    if channels < 1 or len(table) % channels:
        raise DataError(f"expected {what} of as many indices for each of {channels} channels.")
    return table.reshape(channels, len(table) // channels)

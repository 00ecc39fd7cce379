"""A study in one ``.safetensors`` file: correlations, and the samples for refits and measurements."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysolve import __version__
from pysolve.correlations import AnyArray, Correlations
from pysolve.errors import DataError, LayerNotFoundError, PysolveError, whole
from pysolve.nn.cut.bare import find_member
from pysolve.nn.files.storage import in_order
from pysolve.nn.files.sums import (
    Stored,
    StoredCorrelations,
    open_arrays,
    sums_from,
    sums_to_write,
    write_arrays,
)
from pysolve.nn.files.sums_folder import network_checksums
from pysolve.nn.gathering.calibration import Calibration
from pysolve.nn.running import Batch, Inputs, arguments
from pysolve.whole_files import Json

_KEY, _VERSION = "pysolve_study", 1
_LISTS = ("held", "apart", "kept")
# Of batches, as torch names them; None: no container.
_CONTAINERS = (None, "builtins.dict", "builtins.list", "builtins.tuple", "collections.OrderedDict")


def write_study(
    path: Path, model: nn.Module, calibration: Calibration, correlations: Mapping[str, Correlations]
) -> None:
    """Write what was gathered of a network.

    The metadata's entry ``pysolve_study`` is JSON: the ``version``, the network's checksums, ``correlations``
    with the names of each layer's tensors (those that layers share are there once), and the ``samples``,
    whose tensors are the file's and whose plain values are JSON.

    Raises
    ------
    PysolveError
        Batches hold objects that are neither tensors nor plain values.
    """
    arrays, sums = sums_to_write(correlations)
    samples: dict[str, list[dict[str, object]]] = {}
    for name in _LISTS:
        samples[name] = []
        for number, batch in enumerate(getattr(calibration, name)):
            own, record = _batch_to_write(batch, f":{name}:{number}")
            arrays |= own
            samples[name].append(record)
    record = {
        "version": _VERSION,
        "pysolve": __version__,
        "network": network_checksums(model),
        "correlations": sums,
        "samples": samples,
        "limit": calibration.limit,
        "seen": calibration.seen,
        "out": calibration.out,
    }
    write_arrays(path, arrays, {_KEY: json.dumps(record)})


def read_study(path: Path, model: nn.Module) -> tuple[Calibration, StoredCorrelations]:
    """What ``write_study`` wrote; correlations stay in the file until they are asked for.

    Raises
    ------
    DataError
        The file is another one, or damaged.
    PysolveError
        It is of another network.
    """
    arrays, metadata = open_arrays(path)
    try:
        record = json.loads(metadata[_KEY])
        if record["version"] != _VERSION:
            raise DataError(f"{path} has version {record['version']}: this pysolve reads {_VERSION}.")
        held, apart, kept = ([_batch_from(arrays, b) for b in record["samples"][name]] for name in _LISTS)
        limit, seen, out = (whole(name, record[name], 0) for name in ("limit", "seen", "out"))
        correlations = sums_from(arrays, record["correlations"])
        network = dict(record["network"])
    # RuntimeError: JSON that is nested too deeply.
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise DataError(
            f"{path} was not written by Study.save, or it is damaged: {error}. Copy it anew, or gather again."
        ) from error
    check_network(network, model, str(path))
    layers = dict(model.named_modules(remove_duplicate=False))
    for name, one in correlations.stored.items():
        if not _multiplies(model, name):
            raise DataError(
                f"{path} is damaged: it has sums of {name!r}, which is no layer. Copy it anew, or gather "
                "again."
            )
        weight = getattr(layers.get(name), "weight", None)
        h, d = one.arrays["yx"].shape
        if isinstance(weight, nn.Parameter) and weight.numel() != h * d:
            raise DataError(
                f"{path} is damaged: {name} has {weight.numel()} weights, not {h} x {d}. Copy it anew, or "
                "gather again."
            )
    return Calibration(limit, held, apart, kept, seen, out), correlations


def _multiplies(model: nn.Module, name: str) -> bool:
    """Whether a network has a layer, or another member of sites, with values of its own by this name."""
    try:
        member = find_member(model, name)
    except LayerNotFoundError:
        return False
    if not isinstance(member, nn.Module):
        return True
    return hasattr(member, "weight") or any(True for _ in member.parameters(recurse=False))


def check_network(known: Mapping[str, int], model: nn.Module, what: str) -> None:
    """Refuse a network that is not the one a study is of."""
    found = network_checksums(model)
    if known != found:
        others = sorted(known.keys() ^ found.keys()) or [n for n in found if found[n] != known[n]]
        raise PysolveError(
            f"{what} is of another network, which has another {' and another '.join(others[:3])}: give the "
            "network that it was gathered from, with the same weights."
        )


def _batch_to_write(batch: Batch, name: str) -> tuple[dict[str, AnyArray | Stored], dict[str, object]]:
    """Arrays of a batch, and the form they have in it."""
    leaves, form = pytree.tree_flatten(arguments(batch))
    arrays: dict[str, AnyArray | Stored] = {}
    record: list[dict[str, object]] = []
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            kind = str(leaf.dtype).removeprefix("torch.")
            values = in_order(leaf)
            arrays[f"{name}:{number}"] = np.asarray(
                (values.view(torch.int16) if kind == "bfloat16" else values).numpy()
            )
            record.append({"tensor": f"{name}:{number}", "dtype": kind})
        elif leaf is None or isinstance(leaf, str | int | float | bool):
            record.append({"value": leaf})
        else:
            raise PysolveError(
                f"a study with a {type(leaf).__name__} in its batches cannot be saved: files hold tensors "
                "and plain values."
            )
    shared = sorted(batch.shared) if isinstance(batch, Inputs) else None
    told = pytree.treespec_dumps(form)
    try:
        _check_form(json.loads(told)[1])
    except ValueError as error:
        raise PysolveError(f"a study with {error} in its batches cannot be saved.") from error
    return arrays, {"form": told, "leaves": record, "shared": shared}


def _check_form(form: Json) -> None:
    """ValueError for the form of a batch with anything but plain containers.

    For others, torch would import modules that the file names.
    """
    kind, context, parts = form["type"], form["context"], form["children_spec"]
    plain = context is None or json.loads(context) is None
    if kind in ("builtins.dict", "collections.OrderedDict"):
        keys = json.loads(context)
        plain = len(keys) == len(parts) and all(isinstance(key, str | int) for key in keys)
    if kind not in _CONTAINERS or not plain:
        raise ValueError(f"a {kind}")
    for one in parts:
        _check_form(one)


def _batch_from(arrays: Mapping[str, Stored], record: Json) -> Batch:
    leaves = [
        _tensor(arrays[one["tensor"]], one["dtype"]) if "tensor" in one else one["value"]
        for one in record["leaves"]
    ]
    _check_form(json.loads(record["form"])[1])
    args, kwargs = pytree.tree_unflatten(leaves, pytree.treespec_loads(record["form"]))
    if not isinstance(kwargs, dict) or len(args) != (not kwargs):
        raise ValueError("a batch has no inputs")
    if record["shared"] is not None:
        return Inputs(kwargs, [whole("the number of an input", one, 0) for one in record["shared"]])
    return kwargs if kwargs else args[0]


def _tensor(stored: Stored, kind: str) -> Tensor:
    values = torch.from_numpy(stored.read())
    values = values.view(torch.bfloat16) if kind == "bfloat16" else values
    if str(values.dtype) != f"torch.{kind}":
        raise ValueError(f"samples are {values.dtype}, not {kind}")
    return values

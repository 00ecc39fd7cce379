"""What the commands do, once torch may be imported."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import nn

import pysolve as ps
from pysolve.errors import DataError, PysolveError
from pysolve.nn.evaluate import accuracy, latency, macs, nbytes, parameters
from pysolve.records import plain
from pysolve.report import Report
from pysolve.sources import Samples, network, samples


def show_sites(name: str, data: str, weights: Path | None, ignore: Sequence[str], as_json: bool) -> None:
    """Print what of a network can shrink."""
    found = ps.inspect(network(name, weights), _first_batch(samples(data)), ignore=ignore)
    _print(json.dumps(asdict(found), indent=1, default=str) if as_json else str(found))


def compress_to(
    name: str,
    data: str,
    weights: Path | None,
    out: Path,
    *,
    limit: int,
    test: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compress a network, and write it with its report."""
    model = network(name, weights)
    evaluate = _scoring(samples(test, train=False)) if test is not None else None
    result = ps.compress(
        model, samples(data).batches(limit), evaluate=evaluate, progress=not quiet, **options
    )
    out.mkdir(parents=True, exist_ok=True)
    ps.save(result, out / "network.safetensors")
    _write(out / "report.json", json.dumps(plain(result.report.as_dict()), indent=1))
    _write(out / "report.md", _markdown(name, result.report))
    _print_report(result.report, as_json, quiet)
    if not (quiet or as_json):
        _print(f"Wrote {out / 'network.safetensors'}, report.json and report.md")


def sweep_to(
    name: str,
    data: str,
    weights: Path | None,
    out: Path,
    *,
    targets: Sequence[Mapping[str, float]],
    limit: int,
    test: str,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Compress a network to many sizes after one pass over the data, and write what that cost."""
    model = network(name, weights)
    score = _scoring(samples(test, train=False))
    reports = ps.sweep(
        model,
        samples(data).batches(limit),
        targets=targets,
        evaluate=score,
        progress=not quiet,
        **options,
    )
    out.mkdir(parents=True, exist_ok=True)
    rows = [plain(report.as_dict()) for report in reports]
    _write(out / "sweep.json", json.dumps(rows, indent=1))
    if as_json:
        _print(json.dumps(rows, indent=1))
    elif not quiet:
        _print(f"{'target':<20}{'parameters':>12}{'MACs':>8}{'divergence':>12}{'score':>8}")
        for report in reports:
            asked = ", ".join(f"{measure} {value:g}" for measure, value in (report.target or {}).items())
            costs = f"{report.share('params'):>12.1%}{report.share('macs'):>8.1%}"
            _print(f"{asked:<20}{costs}{report.divergence:>12.4g}{report.score_after:>8.2f}")
        _print(f"Wrote {out / 'sweep.json'}")


def evaluate_network(
    name: str, data: str, weights: Path | None, compressed: Path | None, batch: int, as_json: bool
) -> None:
    """Print a network's accuracy on labelled data, its costs, and how long a batch takes."""
    model = network(name, weights)
    if compressed is not None:
        model = ps.load(compressed, model)
    x, y = samples(data, train=False).labelled()
    time = latency(model, x[:batch])
    found = {
        "accuracy": accuracy(model, x, y),
        "params": parameters(model),
        "macs": macs(model, torch.from_numpy(x[:1])),
        "bytes": nbytes(model),
        "latency_ms": 1e3 * time.median,
        "batch": time.batch_size,
        "threads": time.threads,
    }
    if as_json:
        _print(json.dumps(found, indent=1))
        return
    _print(f"accuracy   {found['accuracy']:.2f} % of {len(x)}")
    _print(f"parameters {found['params']:,}\nMACs       {found['macs']:,}\nbytes      {found['bytes']:,}")
    _print(f"latency    {time} for {time.batch_size} samples on {time.threads} threads")


def solve_file(
    path: Path, lam: float, relative: bool, method: str, group_size: int, out: Path | None, as_json: bool
) -> None:
    """Solve the reconstruction problem in an .npz file."""
    try:
        with path.open("rb") as file:
            arrays = np.load(file, allow_pickle=False)
            r_xx, r_yx = arrays["r_xx"], arrays["r_yx"]
    except (KeyError, ValueError, EOFError, OSError, IndexError, BadZipFile) as error:
        raise DataError(f"{path} must be an .npz file with r_xx and r_yx: {error}") from error
    if relative:
        lam = lam * ps.lam_max(r_xx, r_yx, group_size=group_size)
    solution = ps.solve_linear_reconstruction(r_xx, r_yx, lam, method, group_size=group_size)
    if out is not None:
        part = out.with_name(out.name + ".part.npz")
        np.savez(part, M=solution.M, keep=solution.keep, lam=solution.lam)
        os.replace(part, out)
    found = {
        "lam": solution.lam,
        "kept": len(solution.keep),
        "groups": r_xx.shape[0] // group_size,
        "objective": solution.objective,
        "relative_gap": solution.relative_gap,
        "kkt": solution.kkt,
        "iterations": solution.iterations,
        "seconds": solution.seconds,
    }
    _print(json.dumps(found, indent=1) if as_json else str(solution))


def _first_batch(given: Samples) -> Any:
    batch = next(iter(given.batches(1)), None)
    if batch is None:
        raise DataError("the data hold no batch.")
    return batch


def _scoring(test: Samples) -> Callable[[nn.Module], float]:
    x, y = test.labelled()
    return lambda model: accuracy(model, x, y)


def _markdown(name: str, report: Report) -> str:
    return f"# {name}, compressed\n\n```text\n{report}\n```\n"


def _print_report(report: Report, as_json: bool, quiet: bool) -> None:
    if as_json:
        _print(json.dumps(plain(report.as_dict()), indent=1))
    elif not quiet:
        _print(str(report))


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")


def _write(path: Path, text: str) -> None:
    """Never half a file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text + "\n", encoding="utf-8")
    os.replace(part, path)


def targets_of(given: Sequence[str]) -> dict[str, float]:
    """``params=0.25`` as {"params": 0.25}."""
    found: dict[str, float] = {}
    for item in given:
        measure, _, value = item.partition("=")
        try:
            found[measure] = float(value)
        except ValueError:
            raise PysolveError(f"expected a target such as params=0.25 or macs=0.5, got {item!r}.") from None
    return {measure: int(value) if value > 1 else value for measure, value in found.items()}


def duration_of(given: str) -> float | dict[str, float]:
    """``60s``, ``2m`` or ``60`` as seconds, ``5e`` as epochs."""
    number, unit = (given[:-1], given[-1]) if given[-1:] in ("s", "m", "e") else (given, "s")
    try:
        value = float(number)
    except ValueError:
        raise PysolveError(f"expected a time such as 60s, 2m or 5e (epochs), got {given!r}.") from None
    return {"epochs": int(value)} if unit == "e" else value * (60 if unit == "m" else 1)

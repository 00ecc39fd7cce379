"""``pysolve solve``: without torch, so that it answers at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import typer

from pysolve.cli.arrays import arrays_in
from pysolve.cli.outputs import check_new
from pysolve.errors import DataError
from pysolve.solve.certificate import lam_max
from pysolve.solve.problem import check_lam
from pysolve.solve.solvers import solve_linear_reconstruction
from pysolve.whole_files import replacing


def solve_file(
    file: Path,
    lam: float,
    relative: bool,
    method: str,
    group_size: int,
    out: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Solve the reconstruction problem in an .npz file."""
    if out is not None:
        check_new(out, overwrite=overwrite)
    check_lam(lam)
    arrays = arrays_in(file)
    if not {"r_xx", "r_yx"} <= arrays.keys():
        known = ", ".join(arrays) or "nothing"
        raise DataError(f"{file} must be an .npz file with r_xx and r_yx, but it has {known}.")
    r_xx, r_yx = arrays["r_xx"], arrays["r_yx"]
    if relative:
        most = lam_max(r_xx, r_yx, group_size=group_size)
        if not most:
            raise DataError(f"r_yx in {file} is zero: no group is worth keeping at any lam.")
        lam = lam * most
    solution = solve_linear_reconstruction(r_xx, r_yx, lam, method, group_size=group_size)
    if out is not None:
        with replacing(out, np.asarray(solution.M).nbytes) as part, part.open("wb") as opened:
            np.savez(opened, M=solution.M, keep=solution.keep, lam=solution.lam)
    if not as_json:
        typer.echo(str(solution))
        return
    found = {"lam": solution.lam, "kept": len(solution.keep), "groups": r_xx.shape[0] // group_size}
    names = ("objective", "relative_gap", "kkt", "iterations", "seconds")
    typer.echo(json.dumps(found | {name: getattr(solution, name) for name in names}, indent=1))

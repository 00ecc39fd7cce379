"""``python -m pysolve.testing``: this package's solvers on hostile problems, for as long as told."""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from typing import TypedDict

import numpy as np

from pysolve.correlations import Array
from pysolve.solve.certificate import lam_max
from pysolve.solve.problem import Matrices, Problems
from pysolve.solve.solvers import solve_linear_reconstruction
from pysolve.testing.checks import Solve, judge_solver
from pysolve.testing.problems import hostile_problem


class _How(TypedDict):
    group_size: int
    weights: Array


def own_solver(seed: int) -> Solve:
    """A solver of this package: method, number of iterations and of readers by ``seed``."""
    rng = np.random.default_rng([seed, 1])
    method = str(rng.choice(["newton", "newton", "fista", "alternate_minimization", "proximal_gradient"]))
    max_iter, split = int(rng.choice([2000, 2000, 2000, 3, 0])), rng.random() < 0.2

    def solve(
        r_xx: Array, r_yx: Array, lam: float, *, group_size: int, weights: Array, M0: Array | None
    ) -> object:
        how: _How = {"group_size": group_size, "weights": weights}
        problem: Problems = (r_xx, r_yx)
        if split and len(r_yx) > 1:
            problem = [(r_xx, r_yx[:1]), (r_xx, r_yx[1:])]
        # Where all penalised groups are zero from, and not below.
        highest = lam_max(problem, **how)
        if highest:
            above = solve_linear_reconstruction(problem, highest * (1 + 1e-9), method, **how, max_iter=50)
            assert not weights[above.keep].any(), "a penalised group is not zero above lam_max"
            below = solve_linear_reconstruction(problem, 0.9 * highest, method, **how, max_iter=50)
            assert weights[below.keep].any(), "all penalised groups are zero below lam_max"
        start: Matrices | None = (M0[:1], M0[1:]) if isinstance(problem, list) and M0 is not None else M0
        found = solve_linear_reconstruction(problem, lam, method, **how, M0=start, max_iter=max_iter)
        assert found.converged == (found.relative_gap <= 1e-8), f"{found.status} at {found.relative_gap:.1e}"
        return found

    return solve


def main() -> int:
    """Try this package's solvers for as long as told; 1 where one was wrong."""
    parser = argparse.ArgumentParser(prog="python -m pysolve.testing", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--problems", type=int, help="stop after so many")
    parser.add_argument("--seed", type=int, help="of the first problem; by default another one each time")
    options = parser.parse_args()
    first = int(np.random.default_rng().integers(2**31)) if options.seed is None else options.seed
    print(f"problems from seed {first} on", flush=True)
    began, counts, seed = time.monotonic(), Counter[str](), first
    while time.monotonic() - began < options.seconds and seed - first != options.problems:
        problem = hostile_problem(seed)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                faults = judge_solver(own_solver(seed), problem).faults
        except Exception as error:
            faults = (f"{type(error).__name__}: {error}",)
        counts["right" if not faults else "wrong"] += 1
        if faults:
            print(f"{problem}: {'; '.join(faults)}", flush=True)
        seed += 1
    print(f"{seed - first:,} problems, seeds {first} to {seed - 1}: {counts['wrong']} wrong")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Time our solvers against the published algorithms and general packages, at equal certified precision.

python bench/solvers.py [--threads 1] [--repeats 5] [--tol 1e-8] [--only published,packages,large,scaling]

Every answer is judged by pysolve.solve.certificate. A transcription is stopped at the first iterate whose
certified relative gap is at most tol; that iterate is found in an untimed run, so that it pays for no
stopping test. Runs alternate between the contenders; the table gives medians.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import contenders
import numpy as np
import packages
import problems
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

import pysolve as ps


def quick_gap(problem: problems.ReconstructionProblem) -> Callable[[np.ndarray], float]:
    """The certificate's relative gap with its eigendecomposition done once."""
    values, vectors = np.linalg.eigh(problem.r_xx)
    sound = values > 1e-13 * len(values) * values[-1]
    B = (problem.r_yx @ vectors[:, sound] / values[sound]) @ vectors[:, sound].T
    target, lam = B @ problem.r_xx, problem.lam

    def gap(M: np.ndarray) -> float:
        product = M @ problem.r_xx
        G, norms = product - problem.r_yx, np.linalg.norm(M, axis=0)
        s = min(1.0, lam / np.linalg.norm(G, axis=0).max())
        young, slope = np.vdot(G, M) + lam * norms.sum(), np.vdot(target - product, M)
        bend = np.vdot(target - product, B - M)
        objective = 0.5 * np.vdot(product, M) - np.vdot(problem.r_yx, M) + lam * norms.sum()
        return (young + (1 - s) * slope + 0.5 * (1 - s) ** 2 * bend) / abs(objective)

    return gap


def iterations_to(iterates: Iterator[np.ndarray], gap: Callable[[np.ndarray], float], tol: float) -> int:
    return next(k for k, M in enumerate(iterates, start=1) if gap(M) <= tol)


def take(iterates: Callable[[], Iterator[np.ndarray]], k: int) -> np.ndarray:
    return next(itertools.islice(iterates(), k - 1, None))


def runners(problem: problems.ReconstructionProblem, tol: float) -> dict[str, Callable[[], np.ndarray]]:
    """Every contender as a function that returns its answer."""
    data = (problem.r_xx, problem.r_yx, problem.lam)
    gap = quick_gap(problem)
    runs: dict[str, Callable[[], np.ndarray]] = {}
    for method, unconditional in (("fista", 0), ("alternate_minimization", 50)):
        iterates = partial(getattr(contenders, method), *data)
        runs[f"published {method}, its own stop"] = lambda iterates=iterates, unconditional=unconditional: (
            contenders.published_stop(iterates(), unconditional=unconditional)
        )
        runs[f"published {method}, stopped at tol"] = partial(
            take, iterates, iterations_to(iterates(), gap, tol)
        )
    for method in ("fista", "alternate_minimization", "newton"):
        runs[f"pysolve {method}"] = lambda method=method: (
            ps.solve_linear_reconstruction(*data, method, group_size=problem.group_size, tol=tol).M
        )
    return runs


def timed(run: Callable[[], np.ndarray]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(problem: problems.ReconstructionProblem, tol: float, repeats: int) -> None:
    runs = runners(problem, tol)
    answers = {name: run() for name, run in runs.items()}
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(timed(run))
    walls = {name: statistics.median(wall for wall, _ in rows) for name, rows in times.items()}
    print(f"\n{problem.name}, lam={problem.lam}, relative gap {tol:g}")
    ours = [name for name in runs if name.startswith("pysolve")]
    print(
        f"{'':48}{'seconds':>9}{'cpu s':>9}{'gap':>10}"
        + "".join(f"{name.split()[1][:9]:>11}" for name in ours)
    )
    for name in runs:
        cpu = statistics.median(cpu for _, cpu in times[name])
        gap = ps.certify(problem.r_xx, problem.r_yx, answers[name], problem.lam).relative_gap
        ratios = "".join(f"{walls[name] / walls[other]:10.1f}x" for other in ours)
        print(f"{name:48}{walls[name]:9.4f}{cpu:9.4f}{gap:10.1e}{ratios}")


def against_packages(tol: float, patience: float = 30.0) -> None:
    print(f"\nnewton against general packages, relative gap {tol:g}, CPU seconds")
    for problem in (problems.relu_layer(512, 256, 0.1), problems.relu_layer(512, 256, 0.01)):
        gap = quick_gap(problem)
        runs = [timed_solution(problem, tol) for _ in range(5)]
        ours = statistics.median(cpu for _, cpu, _ in runs)
        print(
            f"{problem.name}: newton {ours:.4f} s, {len(runs[0][2].keep)} groups, gap {gap(runs[0][2].M):.1e}"
        )
        for name, solve in packages.contenders(problem.r_xx, problem.r_yx, problem.lam).items():
            seconds, reached = packages.race(solve, gap, tol, patience)
            print(f"    {name:14} {seconds:9.2f} s, gap {reached:.1e}: {seconds / ours:.0f} times newton's")


def timed_solution(problem: problems.ReconstructionProblem, tol: float) -> tuple[float, float, ps.Solution]:
    wall, cpu = time.perf_counter(), time.process_time()
    solution = ps.newton((problem.r_xx, problem.r_yx), problem.lam, group_size=problem.group_size, tol=tol)
    return time.perf_counter() - wall, time.process_time() - cpu, solution


def large(tol: float) -> None:
    print(f"\nnewton on larger problems, relative gap {tol:g}; one product: M R with a dense (h, d) matrix M")
    for problem in filter(
        None, (problems.relu_layer(2048, 512, 0.01), problems.lenet_fc1(0.01), problems.convolution())
    ):
        walls = [timed(lambda problem=problem: problem.r_yx @ problem.r_xx)[0] for _ in range(5)]
        wall, _, solution = min((timed_solution(problem, tol) for _ in range(3)), key=lambda run: run[0])
        products = wall / statistics.median(walls)
        print(
            f"{problem.name:60} {wall:8.3f} s = {products:5.1f} products, {len(solution.keep)} groups, "
            f"gap {solution.relative_gap:.1e}"
        )


def scaling(path: Path) -> None:
    """Newton's rounds cost what the active groups cost; preparation and certificate grow with d."""
    sizes, rounds, whole, kept = (256, 512, 1024, 2048, 4096), [], [], []
    for d in sizes:
        problem = problems.few_active(d, 256, active=64)
        wall, _, solution = min((timed_solution(problem, 1e-8) for _ in range(3)), key=lambda run: run[0])
        whole.append(wall)
        rounds.append(solution.history.seconds[-1] - solution.history.seconds[0])
        kept.append(len(solution.keep))
        print(f"d={d:5}: {kept[-1]} groups active, rounds {rounds[-1]:.4f} s, whole call {wall:.4f} s")
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    ax = figure.subplots()
    ax.loglog(sizes, whole, "o-", color="#9a9a9a", label="whole call: checks, certificate, rounds")
    ax.loglog(sizes, rounds, "o-", color="#0a6e9c", label="Newton's rounds")
    ax.set(
        xlabel="inputs d",
        ylabel="seconds",
        title=f"Newton with {max(kept)} groups active, h = 256",
    )
    ax.set_xticks(sizes, [str(d) for d in sizes])
    ax.minorticks_off()
    ax.grid(axis="y", color="#e5e5e5")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tol", type=float, default=1e-8)
    parser.add_argument("--only", default="published,packages,large,scaling")
    options = parser.parse_args()
    chosen = options.only.split(",")
    with threadpool_limits(options.threads):
        print(f"{options.threads} BLAS thread(s), median of {options.repeats} alternating runs")
        if "published" in chosen:
            for problem in (problems.toy(), problems.benchmark()):
                compare(problem, options.tol, options.repeats)
        if "packages" in chosen:
            against_packages(tol=1e-6)
        if "large" in chosen:
            large(tol=1e-8)
        if "scaling" in chosen:
            scaling(Path("results/newton_scaling.png"))


if __name__ == "__main__":
    main()

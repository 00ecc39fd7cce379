"""Time the elimination path, and compare what the selectors leave at equal size.

python bench/elimination.py [--threads 1 2] [--repeats 5] [--small]

LeNet's fc1 comes from real activations when PYSOLVE_DATA names a folder that holds mnist/ (the network is
trained for an epoch first), otherwise from random ones. A transcription of the textbook algorithm into NumPy
(invert once, then one Schur complement a removal) stands beside. Every path's errors are checked by refits.
Single inputs are counted in float64 products of the same size, timed before and after.
"""

import argparse
import time
from collections.abc import Callable

import numpy as np
from problems import ReconstructionProblem, lenet_fc1, unequal_channels
from threadpoolctl import threadpool_limits

import pysolve as ps

METHODS = ("swap", "elimination", "forward", "lasso", "weighted_lasso", "magnitude", "activation")


def transcription(problem: ReconstructionProblem, ridge: float = 1e-8) -> list[int]:
    """Group OBS as in the textbook, one Schur complement of H and W a removal."""
    g, R, C = problem.group_size, problem.r_xx, problem.r_yx
    unit = np.sqrt(np.where(np.diag(R) > 0, np.diag(R), 1.0))
    H = np.linalg.inv(R / unit / unit[:, None] + ridge * np.eye(len(R)))
    W = C / unit @ H
    alive, order = list(range(len(R) // g)), []
    while alive:
        n = len(alive)
        blocks = H.reshape(n, g, n, g)[np.arange(n), :, np.arange(n), :]
        columns = W.reshape(len(W), n, g).transpose(1, 2, 0)
        costs = np.trace(np.linalg.solve(blocks, columns @ columns.transpose(0, 2, 1)), axis1=1, axis2=2)
        p = int(np.argmin(costs))
        out = slice(p * g, (p + 1) * g)
        step = np.linalg.solve(H[out, out], H[out])
        rest = np.delete(np.arange(n * g), np.arange(p * g, (p + 1) * g))
        W = (W - W[:, out] @ step)[:, rest]
        H = (H - H[:, out] @ step)[np.ix_(rest, rest)]
        order.append(alive.pop(p))
    return order


def timed(run: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Least wall and CPU seconds."""
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    return min(walls), min(cpus)


def explained(problem: ReconstructionProblem, keep: np.ndarray) -> float:
    M = ps.debias(problem.r_xx, problem.r_yx, keep, group_size=problem.group_size)
    return float(np.vdot(problem.r_yx, M) - 0.5 * np.vdot(M @ problem.r_xx, M))


def check(problem: ReconstructionProblem, path: ps.EliminationPath) -> float:
    """Largest relative difference between the path's errors and those of refits."""
    sizes = range(0, len(path.order) + 1, max(len(path.order) // 4, 1))
    return max(abs(path.error[k] + explained(problem, path.keep(k))) for k in sizes) / -path.error[-1]


def compare(
    problem: ReconstructionProblem, threads: list[int], repeats: int, with_transcription: bool
) -> None:
    data, size = (problem.r_xx, problem.r_yx), problem.group_size
    print(f"\n{problem.name}: d={len(data[0])}, groups of {size}, h={len(data[1])}")
    for count in threads:
        with threadpool_limits(count):
            wall, cpu = timed(lambda: ps.elimination_path(*data, group_size=size), repeats)
            print(f"  pysolve, {count} thread(s){'':13}{1e3 * wall:9.1f} ms {1e3 * cpu:9.1f} ms cpu")
            if with_transcription:
                wall, cpu = timed(lambda: transcription(problem), min(repeats, 3))
                print(f"  transcription, {count} thread(s){'':7}{1e3 * wall:9.1f} ms {1e3 * cpu:9.1f} ms cpu")
    path = ps.elimination_path(*data, group_size=size)
    print(f"  errors differ from refits by {check(problem, path):.1e} of what all groups explain")


def compare_selectors(problem: ReconstructionProblem, share: float) -> None:
    groups = len(problem.r_xx) // problem.group_size
    k, total = max(int(share * groups), 1), explained(problem, np.arange(groups))
    print(f"  {k} of {groups} groups kept: error beyond that of all groups, in % of what they explain")
    for method in METHODS:
        start = time.perf_counter()
        keep = ps.select_channels(problem.r_xx, problem.r_yx, k, method=method, group_size=problem.group_size)
        seconds = time.perf_counter() - start
        print(f"    {method:16}{100 * (1 - explained(problem, keep) / total):8.2f} %{seconds:9.3f} s")


def products(d: int, h: int, threads: list[int], repeats: int) -> None:
    """A path over single inputs in float64 products of d × d × d of the same run, in CPU seconds."""
    rng = np.random.default_rng(0)
    x = np.maximum(rng.standard_normal((2 * d, d)) @ rng.standard_normal((d, d)) / np.sqrt(d), 0)
    R = x.T @ x / len(x)
    C, A = rng.standard_normal((h, d)) @ R / np.sqrt(d), rng.standard_normal((d, d))
    print(f"\nsingle inputs: d={d}, h={h}")
    for count in threads:
        with threadpool_limits(count):
            before = timed(lambda: A @ R, repeats)[1]
            own = timed(lambda: ps.elimination_path(R, C), repeats)[1]
            product = (before + timed(lambda: A @ R, repeats)[1]) / 2
            print(f"  {count} thread(s): {own:.2f} s cpu, {own / product:.2f} products of {product:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="leave out layers of 4,096 inputs and more")
    options = parser.parse_args()
    layer = lenet_fc1(0.01) or unequal_channels(800, 500, 16, 2400, name="random stand-in for LeNet-5 fc1")
    compare(layer, options.threads, options.repeats, True)
    for share in (0.1, 0.2, 0.5):
        compare_selectors(layer, share)
    if not options.small:
        convolution = unequal_channels(4608, 512, 9, 6000, name="convolution, 512 channels, 3x3")
        compare(convolution, options.threads, min(options.repeats, 2), False)
        products(4096, 512, options.threads, 2)


if __name__ == "__main__":
    main()

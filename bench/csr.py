"""Sparse products beside SciPy's, torch's and MKL's sparse ones, and beside dense layers.

python bench/csr.py [--shapes 1024x1024,…] [--batches 1,8,…] [--densities 0.5,0.1,…] [--threads 1,2]

One process; all contenders take turns in every round, and each one's best round counts. pysolve runs in
both layouts; the sparse peers multiply feature-major matrices, as they do best, and the dense layers
batch-major ones. 512x784 is a really pruned first layer of a perceptron for MNIST if --data DIR has the
images; the others are random.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

os.environ.setdefault("MKL_RT", next(map(str, Path(sys.prefix, "lib").glob("libmkl_rt.so*")), ""))

os.environ.setdefault("KMP_BLOCKTIME", "1")

import numpy as np
import scipy.sparse as sp
import torch
import typer
from rich.console import Console
from rich.table import Table
from threadpoolctl import threadpool_limits
from torch.nn.functional import linear

import pysolve as ps
from pysolve import _core

Contender = Callable[[], object]

SPARSE_PEERS, DENSE_PEERS = ("scipy", "torch CSR", "MKL"), ("F.linear", "oneDNN prepacked")
BATCH_MAJOR = ("pysolve, batch", *DENSE_PEERS)
# A turn is warmed up and lasts about so long, and no contender gets more than the most in all.
DATA = Path(os.environ.get("PYSOLVE_DATA", "data"))
WARM_SECONDS, ROUND_SECONDS, MOST_SECONDS, ROUNDS = 0.003, 0.003, 1.0, 9
# OpenMP's threads spin on after a product: nobody starts before they sleep.
PAUSE = 0.005

warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = Console(highlight=False, width=150)


def random_matrix(rows: int, columns: int, density: float) -> sp.csr_array:
    rng = np.random.default_rng(0)
    return sp.random_array(
        (rows, columns),
        density=density,
        format="csr",
        dtype=np.float32,
        rng=rng,
        data_sampler=rng.standard_normal,
    )


def pruned_matrix(data: Path, density: float) -> sp.csr_array:
    """The largest weights of a trained layer of 512 neurons, 784 inputs."""
    from pysolve.cli.datasets import mnist
    from pysolve.training.fit import fit

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(784, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)
    )
    images = mnist(data / "mnist")
    fit(network, images.x_train[:10_000], images.y_train[:10_000], epochs=3, progress=False)
    weight = network[1].weight.detach().numpy()
    threshold = np.quantile(np.abs(weight), 1 - density)
    return sp.csr_array(np.where(np.abs(weight) > threshold, weight, 0).astype(np.float32))


def contenders(csr: sp.csr_array, batch: int) -> dict[str, Contender]:
    """Ways to multiply the same matrices, prepared as far as each allows, and checked."""
    rng = np.random.default_rng(1)
    feature = rng.standard_normal((csr.shape[1], batch), np.float32)
    rows = np.ascontiguousarray(feature.T)
    matrix, weight = ps.SparseMatrix.from_csr(csr), torch.from_numpy(csr.toarray())
    wide, tall = np.empty((csr.shape[0], batch), np.float32), np.empty((batch, csr.shape[0]), np.float32)
    theirs, x, x_rows = (
        torch.from_numpy(csr.toarray()).to_sparse_csr(),
        torch.from_numpy(feature),
        torch.from_numpy(rows),
    )
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, batch)
    found: dict[str, Contender] = {
        "pysolve, feature": lambda: matrix.matmul(feature, "feature", out=wide),
        "pysolve, batch": lambda: matrix.matmul(rows, "batch", out=tall),
        "scipy": lambda: csr @ feature,
        "torch CSR": lambda: theirs @ x,
        "F.linear": lambda: linear(x_rows, weight),
        "oneDNN prepacked": lambda: torch.ops.mkldnn._linear_pointwise(x_rows, packed, None, "none", [], ""),
    }
    if mkl is not None:
        old = sp.csr_matrix(csr)
        found["MKL"] = lambda: mkl.dot_product_mkl(old, feature, out=wide, out_scalar=0.0)
    expected = csr @ feature
    for name, run in found.items():
        result = np.asarray(run())
        if name in BATCH_MAJOR:
            result = result.T
        if not np.allclose(result, expected, atol=1e-2):
            raise SystemExit(f"{name} computes something else")
    return found


def best_seconds(runs: dict[str, Contender], threads: int) -> dict[str, float]:
    """Shortest of the rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    spent = dict.fromkeys(runs, 0.0)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            if spent[name] < MOST_SECONDS:
                start = time.perf_counter()
                time.sleep(PAUSE * (threads > 1))
                if not times[name] or times[name][-1] < WARM_SECONDS:
                    repeated(run, WARM_SECONDS)
                times[name].append(repeated(run, ROUND_SECONDS))
                spent[name] += time.perf_counter() - start
    return {name: min(seconds) for name, seconds in times.items()}


def repeated(run: Contender, seconds: float) -> float:
    """Mean time of calls, as many as begin within so many seconds."""
    start, calls = time.perf_counter(), 0
    while not calls or time.perf_counter() - start < seconds:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


def row(csr: sp.csr_array, batch: int, threads: int) -> dict[str, object]:
    ps.set_num_threads(threads)
    torch.set_num_threads(threads)
    if mkl is not None:
        mkl.mkl_set_num_threads(threads)
    with threadpool_limits(threads, user_api="blas"), torch.no_grad():
        seconds = best_seconds(contenders(csr, batch), threads)
    density = csr.nnz / np.prod(csr.shape)
    return {
        "shape": csr.shape,
        "density": round(float(density), 3),
        "batch": batch,
        "threads": threads,
    } | seconds


def numbers(text: str) -> list[float]:
    return [float(item) for item in text.split(",")]


@app.command()
def main(
    shapes: str = "500x800,512x784,1024x1024,4096x4096,4096x11008",
    batches: str = "1,8,64,256,1024",
    densities: str = "0.5,0.2,0.1,0.05,0.01",
    threads: str = "1,2",
    level: Annotated[str, typer.Option(help="Of instructions: plain, avx2 or avx512.")] = _core.level(),
    data: Path = DATA,
    out: Path = Path("results/csr.json"),
) -> None:
    _core.set_level(level)
    if mkl is None:
        console.out("MKL is left out: install sparse-dot-mkl and mkl to have it.")
    table = Table(title=f"Milliseconds of pysolve ({level}), and how many times as long the others take")
    heads = (
        "shape",
        "density",
        "batch",
        "threads",
        "feature",
        "GFLOP/s",
        "batch-major",
        *SPARSE_PEERS,
        *DENSE_PEERS,
    )
    for head in heads:
        table.add_column(head, justify="right")
    rows = []
    for shape in shapes.split(","):
        h, d = map(int, shape.split("x"))
        for density in numbers(densities):
            real = shape == "512x784" and (data / "mnist").is_dir()
            csr = pruned_matrix(data, density) if real else random_matrix(h, d, density)
            for batch in map(int, numbers(batches)):
                for count in map(int, numbers(threads)):
                    rows.append(row(csr, batch, count))
                    table.add_row(*cells(rows[-1], csr.nnz))
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"level": level, "torch": torch.__version__, "rows": rows}, indent=1))
    console.print(table)


def cells(one: dict[str, object], nnz: int) -> list[str]:
    """Sparse peers against pysolve feature-major, as they are; dense ones against it batch-major."""
    feature, batch_major = one["pysolve, feature"], one["pysolve, batch"]
    ratios = [one[name] / feature if name in one else float("nan") for name in SPARSE_PEERS]
    ratios += [one[name] / batch_major for name in DENSE_PEERS]
    return [
        "x".join(map(str, one["shape"])),
        f"{one['density']:.2f}",
        str(one["batch"]),
        str(one["threads"]),
        f"{1e3 * feature:.3f}",
        f"{2e-9 * nnz * one['batch'] / feature:.0f}",
        f"{1e3 * batch_major:.3f}",
        *(f"{ratio:.2f}" for ratio in ratios),
    ]


try:
    import sparse_dot_mkl as mkl
except ImportError:
    mkl = None

if __name__ == "__main__":
    app()

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T", np.float32, np.float64)

Array = npt.NDArray[np.float64]
Report = Callable[[int, float, float], None]

class Problem:
    def __init__(
        self,
        *,
        xx: Sequence[Array],
        outputs: Sequence[int],
        yx: Array,
        group_size: int,
        weights: Array,
        constant: float = 0.0,
    ) -> None: ...

class Result:
    @property
    def M(self) -> Array: ...
    @property
    def kkt(self) -> Array: ...
    @property
    def objective(self) -> float: ...
    @property
    def gap(self) -> float: ...
    @property
    def floor(self) -> float: ...
    @property
    def iterations(self) -> int: ...
    @property
    def history(self) -> Array: ...

class Levels:
    def round_block(
        self,
        *,
        base: Array,
        slope: Array,
        divisor: Array,
        power: Array,
        outputs: Array,
        coupling: Array,
        inputs: npt.NDArray[np.int64],
        mask: npt.NDArray[np.bool_] | None,
    ) -> tuple[npt.NDArray[np.int64], Array]: ...

class GridLevels(Levels):
    def __init__(self, *, scales: Array, zeros: Array, low: float, high: float, group: int) -> None: ...

class SharedLevels(Levels):
    def __init__(self, values: Array) -> None: ...

class PricedLevels(Levels):
    def __init__(self, *, values: Array, bits: Array, lam: float) -> None: ...

def cholesky(matrix: Array) -> bool: ...
def eliminate_rows(inverse: Array, W: Array) -> tuple[npt.NDArray[np.int32], Array]: ...
def prox_group_lasso(V: Array, group_size: int, thresholds: Array) -> Array: ...
def fista(
    problem: Problem,
    lam: float,
    M0: Array,
    *,
    tol: float,
    max_iter: int,
    momentum: bool,
    restart: bool,
    q: float,
    callback: Report | None,
) -> Result: ...
def alternate_minimization(
    problem: Problem,
    lam: float,
    M0: Array,
    *,
    tol: float,
    max_iter: int,
    rounds: int,
    epsilon: float,
    callback: Report | None,
) -> Result: ...
def newton(
    problem: Problem, lam: float, M0: Array, *, tol: float, max_iter: int, callback: Report | None
) -> Result: ...
def variational(problem: Problem, lam: float, scales: Array) -> tuple[float, Array, Array]: ...

class Selection:
    @property
    def order(self) -> list[int]: ...
    @property
    def change(self) -> Array: ...
    @property
    def ridge(self) -> float: ...
    @property
    def largest_inverse(self) -> float: ...

def eliminate(problem: Problem, *, ridges: Sequence[float], smallest: int) -> Selection: ...
def forward(problem: Problem, *, ridge: float, count: int) -> Selection: ...
def swap_groups(
    problem: Problem, keep: Sequence[int], *, ridge: float, max_swaps: int, depth: int
) -> list[int]: ...

class _Sparse(Generic[T]):
    def __init__(
        self,
        rows: int,
        columns: int,
        indptr: npt.NDArray[np.integer],
        indices: npt.NDArray[np.integer],
        values: npt.NDArray[T],
        *,
        block: int = 0,
    ) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def block(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def values(self) -> npt.NDArray[T]: ...
    def indptr(self) -> npt.NDArray[np.int64]: ...
    def indices(self) -> npt.NDArray[np.int32]: ...
    def multiply(
        self,
        x: npt.NDArray[T],
        batch_major: bool,
        out: npt.NDArray[T],
        bias: npt.NDArray[T] | None,
        relu: bool,
        threads: int,
    ) -> None: ...
    def value_gradient(
        self, g: npt.NDArray[T], x: npt.NDArray[T], batch_major: bool, threads: int
    ) -> npt.NDArray[T]: ...

class SparseFloat32(_Sparse[np.float32]): ...
class SparseFloat64(_Sparse[np.float64]): ...

def num_threads() -> int: ...
def set_num_threads(threads: int) -> None: ...
def levels() -> list[str]: ...
def level() -> str: ...
def set_level(name: str) -> None: ...

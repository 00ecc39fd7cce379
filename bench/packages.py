"""General-purpose packages on the same problems. Those that are not installed are left out.

They want samples: X and Y with XᵀX/d = R and XᵀY/d = Cᵀ, from a square root of R that is not timed. Their
problem, ½/d ‖Y − X W‖² + α Σ_j ‖W_j‖, is then ours with M = Wᵀ and α = lam (groups of one input only).
"""

import time
import warnings
from collections.abc import Callable

import numpy as np


def square_root(R: np.ndarray, C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, vectors = np.linalg.eigh(R)
    sound = values > 1e-13 * len(R) * values[-1]
    root = np.sqrt(len(R) * values[sound])
    X = np.zeros_like(R)
    Y = np.zeros((len(R), len(C)))
    X[: sound.sum()] = root[:, None] * vectors[:, sound].T
    Y[: sound.sum()] = len(R) / root[:, None] * (vectors[:, sound].T @ C.T)
    return np.asfortranarray(X), np.asfortranarray(Y)


def scikit_learn(X: np.ndarray, Y: np.ndarray, lam: float, tol: float) -> np.ndarray:
    from sklearn.linear_model import MultiTaskLasso

    return MultiTaskLasso(lam, fit_intercept=False, tol=tol, max_iter=100_000, copy_X=False).fit(X, Y).coef_


def celer(X: np.ndarray, Y: np.ndarray, lam: float, tol: float) -> np.ndarray:
    # Its estimator does not run beside this scikit-learn; the solver below it does.
    from celer.homotopy import mtl_path

    return mtl_path(X, Y, alphas=[lam], tol=tol, max_iter=1000, max_epochs=100_000)[1][:, :, 0]


def skglm(X: np.ndarray, Y: np.ndarray, lam: float, tol: float) -> np.ndarray:
    from skglm import MultiTaskLasso

    return (
        MultiTaskLasso(lam, fit_intercept=False, tol=tol, max_iter=1000, max_epochs=100_000).fit(X, Y).coef_
    )


def contenders(R: np.ndarray, C: np.ndarray, lam: float) -> dict[str, Callable[[float], np.ndarray]]:
    """Each package as a function of its own tolerance; compiled once on a small problem, untimed."""
    X, Y = square_root(R, C)
    small = square_root(R[:20, :20], C[:, :20])
    found: dict[str, Callable[[float], np.ndarray]] = {}
    for name, solve in (("scikit-learn", scikit_learn), ("celer", celer), ("skglm", skglm)):
        try:
            quietly(solve, *small, lam, 1e-2)
        except ImportError:
            print(f"{name} is not installed: left out")
            continue
        found[name] = lambda tol, solve=solve: quietly(solve, X, Y, lam, tol)
    return found


def quietly(solve: Callable[..., np.ndarray], *arguments: object) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return solve(*arguments)


def race(
    solve: Callable[[float], np.ndarray], gap: Callable[[np.ndarray], float], tol: float, patience: float
) -> tuple[float, float]:
    """CPU seconds and gap of the first of ever tighter own tolerances whose certified gap is at most ``tol``.

    Gives up after a run longer than ``patience`` seconds, with that run's figures.
    """
    for exponent in range(3, 14, 2):
        start = time.process_time()
        M = solve(10.0**-exponent)
        seconds = time.process_time() - start
        reached = gap(M)
        if reached <= tol or seconds > patience:
            break
    return seconds, reached

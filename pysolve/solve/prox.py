"""The proximal operator of the group-lasso penalty."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pysolve import _core
from pysolve.correlations import Array
from pysolve.solve.problem import checked_group_size, checked_matrix, checked_weights


def prox_group_lasso(
    V: npt.ArrayLike, t: float, *, group_size: int = 1, weights: npt.ArrayLike | None = None
) -> Array:
    """Group soft-thresholding of the columns of V.

    Solves  min_M  ½‖M − V‖_F² + t Σ_g w_g ‖M_g‖_F :  M_g = (1 − t w_g/‖V_g‖)₊ V_g.

    Parameters
    ----------
    V : (h, d) array or CPU tensor
    t : float
        ≥ 0.
    group_size, weights
        As in ``solve_linear_reconstruction``.

    Returns
    -------
    (h, d) array

    Raises
    ------
    ValueError, TypeError
        For a V that is no finite real matrix, or options out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import pysolve as ps
    >>> ps.prox_group_lasso([[3.0, 0.3], [4.0, 0.4]], t=1.0)
    array([[2.4, 0. ],
           [3.2, 0. ]])
    """
    V = checked_matrix("V", V, largest=np.inf)
    if not (np.isfinite(t) and t >= 0):
        raise ValueError(f"t must be finite and at least 0, got {t}.")
    group_size = checked_group_size(group_size, V.shape[1])
    thresholds = float(t) * checked_weights(weights, V.shape[1] // group_size)
    return np.ascontiguousarray(_core.prox_group_lasso(np.ascontiguousarray(V.T), group_size, thresholds).T)

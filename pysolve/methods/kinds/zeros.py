"""Single weights that are removed, by scores or by optimal brain surgeon, and what the others become."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from pysolve.correlations import AnyArray, Array, Mask
from pysolve.layer.layer_fit import LayerFit
from pysolve.layer.masks import PerLayer, count_left, masks
from pysolve.layer.obs import PrunedLayer, obs_prune
from pysolve.layer.row_paths import error_curve, share_weights
from pysolve.methods.menu import Chosen, Fit, Task
from pysolve.methods.study import Study
from pysolve.nn.layer_matrix import matrix
from pysolve.nn.running import as_array

# Methods that choose by a score of each weight.
SCORES: tuple[str, ...] = ("magnitude", "random", "std", "wanda")


@dataclass(frozen=True, eq=False)
class Zeros:
    """Weights of which a share, those below a limit, or a pattern become zero.

    Parameters
    ----------
    method : "magnitude", "random", "std", "wanda" or "obs"
    amount, threshold, sensitivity, pattern
        One of them, as ``prune`` has it.
    scope : "local" or "global"
    seed : int
        Of random scores.
    """

    method: str
    amount: PerLayer | None = None
    threshold: PerLayer | None = None
    sensitivity: PerLayer | None = None
    pattern: str | None = None
    scope: str = "local"
    seed: int = 0

    def choose(self, study: Study) -> Chosen:
        """What every weight of the network is to become."""
        # As matrices, whose rows are outputs also for transposed convolutions.
        matrices = {n: as_array(matrix(study.layers[n].module)) for n in study.weights if n in study.layers}
        weights = {n: matrices[n] if n in matrices else as_array(w) for n, w in study.weights.items()}
        if self.method == "obs":
            return Chosen(fits=self._by_losses(study, weights))
        moments = {name: np.diag(one.r_xx) for name, one in study.correlations.items()}
        return Chosen(fits=self._by_scores(weights, moments))

    def _by_losses(self, study: Study, weights: Mapping[str, AnyArray]) -> dict[str, Fit]:
        """Optimal brain surgeon; an amount of all weights is shared out by the layers' error curves."""
        if self.scope == "global" and self.amount is not None and not isinstance(self.amount, Mapping):
            curves = {
                n: error_curve(w, study.correlations[n])
                for n, w in weights.items()
                if n in study.correlations
            }
            left = count_left(self.amount, sum(weights[name].size for name in curves))
            counts = share_weights(curves, left)
            shares = {name: self.amount for name in weights if name not in counts}
            shares |= {name: 1.0 - count / weights[name].size for name, count in counts.items()}
            return {name: partial(prune_layer, amount=shares[name]) for name in weights}
        if self.pattern is not None:
            return {name: partial(prune_layer, pattern=self.pattern) for name in weights}
        # A layer without an entry keeps all.
        each = self.amount if isinstance(self.amount, Mapping) else dict.fromkeys(weights, self.amount)
        return {name: partial(prune_layer, amount=each.get(name) or 0.0) for name in weights}

    def _by_scores(self, weights: Mapping[str, AnyArray], known: Mapping[str, Array]) -> dict[str, Fit]:
        """Fits on masks of the largest scores."""
        moments = None
        if self.method == "wanda":
            moments = {
                name: known.get(name, np.ones(int(np.prod(w.shape[1:])))) for name, w in weights.items()
            }
        found = masks(
            weights,
            self.amount,
            method=self.method,
            threshold=self.threshold,
            sensitivity=self.sensitivity,
            pattern=self.pattern,
            scope=self.scope,
            second_moments=moments,
            seed=self.seed,
        )
        return {name: partial(prune_to, mask=mask.reshape(len(mask), -1)) for name, mask in found.items()}


def prune_to(task: Task, *, mask: Mask) -> LayerFit:
    """A layer's weights on a mask: refitted where something is known of its inputs."""
    if task.correlations is None:
        return PrunedLayer(np.where(mask, task.weight, 0.0), None, 0.0, mask=mask, method="mask", ridge=0.0)
    return obs_prune(task.weight, task.correlations, mask=mask)


def prune_layer(task: Task, *, amount: float | None = None, pattern: str | None = None) -> LayerFit:
    """Optimal brain surgeon on a layer; the mask that is chosen first stays when targets move.

    Where nothing is known of its inputs, the largest weights stay as they are.
    """
    if amount is not None and amount >= 1:
        # Of all weights together a layer may keep none.
        return prune_to(task, mask=np.zeros(task.weight.shape, bool))
    if task.correlations is None:
        found = masks({task.name: task.weight}, amount if pattern is None else None, pattern=pattern)
        return prune_to(task, mask=found[task.name])
    if isinstance(task.previous, PrunedLayer):
        return obs_prune(task.weight, task.correlations, mask=task.previous.mask)
    return obs_prune(task.weight, task.correlations, amount=amount, pattern=pattern)

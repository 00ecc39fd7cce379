"""torch-pruning as a contender: channels removed by weight norm, step by step, until the target holds."""

import copy
from collections.abc import Callable
from functools import partial

import torch_pruning as tp
from subjects import Subject, Target, with_norms
from torch import nn

STEPS = 400

Compressor = Callable[[Subject, Target], nn.Module]


def pruned(
    subject: Subject, target: Target, *, importance: tp.importance.Importance, global_pruning: bool
) -> nn.Module:
    """Prune a copy until its parameters or multiply-accumulates are at most the target's share."""
    model = copy.deepcopy(subject.model)
    layers = dict(model.named_modules())
    pruner = tp.pruner.MagnitudePruner(
        model,
        subject.example,
        importance=importance,
        global_pruning=global_pruning,
        pruning_ratio=0.99,
        iterative_steps=STEPS,
        ignored_layers=[layers[name] for name in subject.fixed],
    )
    ((what, share),) = target.items()
    for _ in range(STEPS):
        # Group by group, because a step over all layers at once goes too far beyond the target.
        for group in pruner.step(interactive=True):
            group.prune()
            if subject.cost(what, model) <= share * subject.cost(what):
                return model
    raise RuntimeError(f"torch-pruning cannot bring {subject.title} down to {share:.1%} of its {what}.")


def renormed(subject: Subject, target: Target, *, compress: Compressor) -> nn.Module:
    """Result of another contender, with the batch norms' statistics measured anew."""
    return with_norms(compress(subject, target), subject.calibration)


def contenders(subject: Subject) -> dict[str, Compressor]:
    """Weight norms ranked over the whole network or within each layer; LAMP evens out the layers' scales."""
    norm, lamp = tp.importance.MagnitudeImportance(p=2), tp.importance.LAMPImportance(p=2)
    found: dict[str, Compressor] = {
        "torch-pruning L2, global": partial(pruned, importance=norm, global_pruning=True),
        "torch-pruning L2, per layer": partial(pruned, importance=norm, global_pruning=False),
        "torch-pruning LAMP, global": partial(pruned, importance=lamp, global_pruning=True),
    }
    if any(isinstance(module, nn.BatchNorm2d) for module in subject.model.modules()):
        found |= {f"{name}, norms anew": partial(renormed, compress=run) for name, run in found.items()}
    return found

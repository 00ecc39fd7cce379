"""A small network, and points that it can learn to tell apart."""

import numpy as np
import torch
from torch import nn


def clouds(n=120):
    """Three clouds of points, one a class."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, n)
    return (rng.standard_normal((n, 4)) + 3 * np.eye(3, 4)[y]).astype(np.float32), y


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def weights(model):
    return torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])

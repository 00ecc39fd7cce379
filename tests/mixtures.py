"""A convolutional network, and unlabelled samples whose channels are correlated."""

import torch
from torch import nn


def convolutional():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU())
    layers += (nn.Conv2d(12, 10, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(90, 5))
    model = nn.Sequential(*layers).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 1.5)
    return model


def batches(n=3, shape=(10,), size=40):
    random = torch.Generator().manual_seed(1)
    mix = torch.randn(shape[0], shape[0], generator=random)
    rows = [torch.randn(size, *shape, generator=random) for _ in range(n)]
    return [torch.einsum("nc...,cd->nd...", x, mix / shape[0] ** 0.5) for x in rows]


def images():
    return batches(2, (3, 8, 8), 24)

"""The small reference networks of the demo, the examples and the tests."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu


class LeNet5(nn.Module):
    """LeNet-5 as Caffe has it, for (n, 1, 28, 28) images: 431,080 parameters, 93 % of them in ``fc1``.

    References
    ----------
    Y. LeCun et al., Gradient-based learning applied to document recognition, 1998.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(800, 500)
        self.fc2 = nn.Linear(500, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(max_pool2d(self.conv1(x), 2))
        x = relu(max_pool2d(self.conv2(x), 2))
        x = relu(self.fc1(x.flatten(1)))
        return self.fc2(x)  # type: ignore[no-any-return]


class DigitsNet(nn.Module):
    """A convolutional network for (n, 1, 8, 8) digits: 138,698 parameters, 95 % of them in ``fc1``."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.fc1 = nn.Linear(512, 256)
        self.fc2 = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(max_pool2d(self.conv1(x), 2))
        x = relu(self.conv2(x))
        x = relu(self.fc1(x.flatten(1)))
        return self.fc2(x)  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Linear layers ``fc1``, ``fc2``, … with ReLU between them; the input is flattened.

    Parameters
    ----------
    sizes : sequence of int
        Width of the input, of every hidden layer and of the output.
    """

    def __init__(self, sizes: Sequence[int] = (784, 512, 256, 128, 10)) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes must name an input and an output width at least, got {tuple(sizes)}.")
        for i in range(1, len(sizes)):
            setattr(self, f"fc{i}", nn.Linear(sizes[i - 1], sizes[i]))

    def forward(self, x: Tensor) -> Tensor:
        *hidden, last = self.children()
        x = x.flatten(1)
        for layer in hidden:
            x = relu(layer(x))
        return last(x)  # type: ignore[no-any-return]

"""Small reference networks of the demo, the examples and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, hardsigmoid, max_pool2d, relu


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


class LeNetC5(nn.Module):
    """LeNet-5 with its third convolution and a wide ``fc1``, for (n, 1, 28, 28) images: 167,566 parameters.

    80 % of them are in the two Linear layers.

    References
    ----------
    Y. LeCun et al., Gradient-based learning applied to document recognition, 1998 (whose C5 is ``conv3``).
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.conv3 = nn.Conv2d(16, 120, 4)
        self.fc1 = nn.Linear(120, 1024)
        self.fc2 = nn.Linear(1024, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(relu(self.conv1(x)), 2)
        x = max_pool2d(relu(self.conv2(x)), 2)
        x = relu(self.conv3(x)).flatten(1)
        return self.fc2(relu(self.fc1(x)))  # type: ignore[no-any-return]


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
        Units of the input, of every hidden layer and of the output.
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


class MnistCnn(nn.Module):
    """Three convolutions and two Linear layers for (n, 1, 28, 28) images: 390,410 parameters."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        widths = (1, 32, 64, 128)
        stages = [(nn.Conv2d(*pair, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)) for pair in pairwise(widths)]
        self.conv_layers = nn.Sequential(*chain.from_iterable(stages))
        self.fc_layers = nn.Sequential(nn.Linear(9 * widths[-1], 256), nn.ReLU(), nn.Linear(256, classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc_layers(self.conv_layers(x).flatten(1))  # type: ignore[no-any-return]


class ResNet(nn.Module):
    """Residual network for (n, 3, 32, 32) images, with shortcuts that have no parameters.

    Three stages of ``(depth − 2) / 6`` blocks, 16, 32 and 64 channels wide; the second and the third halve
    the image. Depth 20: 269,722 parameters and 41 million multiply-accumulates an image.

    Parameters
    ----------
    depth : int
        20, 32, 44, 56, … : six layers a block in every stage, and two more.
    classes : int

    References
    ----------
    K. He et al., Deep residual learning for image recognition, 2016, §4.2, option A.
    """

    def __init__(self, depth: int = 20, classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth must be 6 k + 2, such as 20, 32, 44 or 56; got {depth}.")
        self.conv1 = _convolution(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class _Block(nn.Module):
    """Residual block of two convolutions, with a shortcut that may halve the image and pad channels."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = _convolution(channels, out, stride=out // channels)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = _convolution(out, out)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if out != channels:
            # Of a 4-D tensor, the last but two of ZeroPad3d's dimensions are the channels.
            added = (out - channels) // 2
            self.shortcut = nn.Sequential(_EverySecond(), nn.ZeroPad3d((0, 0, 0, 0, added, added)))

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(inner)) + self.shortcut(x))


class LeanNet(nn.Module):
    """Inverted residuals for (n, 3, 32, 32) images, as networks for phones have them: no channel to spare.

    A 1 × 1 convolution makes four times the channels, a depthwise one works on each, another 1 × 1
    convolution makes them few again; batch norms after all three, ReLU6 after two. 141,722 parameters and 7.1
    million multiply-accumulates an image.

    Parameters
    ----------
    gated : bool
        Hard-swish instead of ReLU6, and squeeze-and-excitation after each depthwise convolution.
    classes : int

    References
    ----------
    M. Sandler et al., MobileNetV2: inverted residuals and linear bottlenecks, 2018; A. Howard et al.,
    Searching for MobileNetV3, 2019.
    """

    def __init__(self, gated: bool = False, classes: int = 10) -> None:
        super().__init__()
        act = nn.Hardswish if gated else nn.ReLU6
        self.stem = nn.Sequential(*_normed(3, 16, 3, act=act))
        # Channels, and the step by which the image shrinks.
        stages = ((24, 1), (24, 1), (40, 2), (40, 1), (80, 2), (80, 1))
        blocks: list[nn.Module] = [_Inverted(16, 24, 2, act, gated, expansion=1)]
        channels = 24
        for out, stride in stages:
            blocks.append(_Inverted(channels, out, stride, act, gated))
            channels = out
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Sequential(*_normed(channels, 320, act=act))
        self.linear = nn.Linear(320, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(self.blocks(self.stem(x)))
        return self.linear(adaptive_avg_pool2d(x, 1).flatten(1))  # type: ignore[no-any-return]


class _Inverted(nn.Module):
    """Expand, filter each channel, gate, project; added to the input where the shapes are equal."""

    def __init__(
        self, channels: int, out: int, stride: int, act: type[nn.Module], gated: bool, expansion: int = 4
    ) -> None:
        super().__init__()
        inner = expansion * channels
        layers = _normed(channels, inner, act=act) if expansion > 1 else []
        layers += _normed(inner, inner, 3, stride=stride, groups=inner, act=act)
        layers += [_Gate(inner)] if gated else []
        self.layers = nn.Sequential(*layers, *_normed(inner, out))
        self.added = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        inner = self.layers(x)
        return x + inner if self.added else inner  # type: ignore[no-any-return]


class _Gate(nn.Module):
    """Squeeze-and-excitation: a factor for each channel, from the means of all."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(channels, channels // 4, 1)
        self.excite = nn.Conv2d(channels // 4, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * hardsigmoid(self.excite(relu(self.squeeze(adaptive_avg_pool2d(x, 1)))))


def _normed(
    channels: int,
    out: int,
    size: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = None,
) -> list[nn.Module]:
    """A convolution, its batch norm, and what follows."""
    convolution = nn.Conv2d(channels, out, size, stride, size // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(out), *([act()] if act else [])]


class _EverySecond(nn.Module):
    """Every second row and column of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, ::2, ::2]


def _stage(channels: int, out: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(_Block(channels, out), *(_Block(out, out) for _ in range(blocks - 1)))


def _convolution(channels: int, out: int, *, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)

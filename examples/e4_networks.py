"""The networks of the efficiency tutorial, for (n, 3, 32, 32) images."""

from itertools import pairwise

from torch import Tensor, nn
from torch.nn.functional import max_pool2d, relu


class SimpleCnn(nn.Module):
    """conv 16@5 – pool – conv 32@5 – pool – fc 120 – fc 84 – fc 10.

    121,182 parameters; 270,942 with padding, where 8 × 8 instead of 5 × 5 pixels reach ``fc1``.

    Parameters
    ----------
    padding : int
        Of both convolutions: 2 keeps the size of the image.
    """

    def __init__(self, padding: int = 0, classes: int = 10) -> None:
        super().__init__()
        side = 8 if padding else 5
        self.conv1 = nn.Conv2d(3, 16, 5, padding=padding)
        self.conv2 = nn.Conv2d(16, 32, 5, padding=padding)
        self.fc1 = nn.Linear(32 * side**2, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = max_pool2d(relu(self.conv1(x)), 2)
        x = max_pool2d(relu(self.conv2(x)), 2)
        x = relu(self.fc1(x.flatten(1)))
        return self.fc3(relu(self.fc2(x)))


class ResNet18(nn.Module):
    """ResNet-18 with its widths of 64 to 512; the first convolution halves these small images, no pool does.

    11.2 million parameters, 44.8 MB.

    References
    ----------
    K. He et al., Deep residual learning for image recognition, 2016.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        widths = (64, 64, 128, 256, 512)
        stages = [(Block(a, b, 1 + (a != b)), Block(b, b, 1)) for a, b in pairwise(widths)]
        self.stages = nn.Sequential(*(block for stage in stages for block in stage))
        self.fc = nn.Linear(512, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class Block(nn.Module):
    """Two convolutions beside a shortcut, which is a 1 × 1 convolution where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential()
        if channels != out:
            projection = nn.Conv2d(channels, out, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        inner = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(inner)) + self.shortcut(x))

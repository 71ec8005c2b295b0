"""The pre-activation ResNet-18 for small images, in plain torch.nn."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu


class PreActBlock(nn.Module):
    """out = relu(bn1(x)); y = conv2(relu(bn2(conv1(out)))) + shortcut, the shortcut being x where shapes allow.

    Elsewhere it is a 1x1 convolution of ``out`` without bias and without normalisation.

    Source:
        He et al. (2016), arXiv:1603.05027, figure 4(e).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.projects = stride != 1 or in_channels != out_channels
        if self.projects:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(x))
        shortcut = self.shortcut(out) if self.projects else x
        return self.conv2(relu(self.bn2(self.conv1(out)))) + shortcut


class PreActResNet18(nn.Module):
    """Stem, four stages of two pre-activation blocks, average pooling and a linear layer.

    The widths are w, 2w, 4w, 8w and the strides 1, 2, 2, 2. The pooling takes the mean over the
    whole image, which at 32 x 32 pixels is the usual pooling by 4. There is no last normalisation.

    Shape:
        x: (N, in_channels, H, W) -> (N, num_classes), for H and W divisible by 8.
    Source:
        The network of the experiments of Section 6, as in the authors' public code.
    """

    def __init__(self, width: int = 64, in_channels: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"PreActResNet18: width must be at least 1, got {width}.")
        self.conv1 = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.layer1 = self._stage(width, width, 1)
        self.layer2 = self._stage(width, 2 * width, 2)
        self.layer3 = self._stage(2 * width, 4 * width, 2)
        self.layer4 = self._stage(4 * width, 8 * width, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8 * width, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
        return nn.Sequential(PreActBlock(in_channels, out_channels, stride), PreActBlock(out_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer1(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(x)))
        return self.linear(self.pool(x).flatten(1))

"""Blocks and layers that look like those of a ResNet and are not: each breaks one assumption of a conversion."""

import torch
import torch.nn.functional as F
from small_resnets import PostActBlock, PreActBlock
from torch import nn


class Twice(PreActBlock):
    def forward(self, x):
        return super().forward(x) + x


class Norm2d(nn.BatchNorm2d):
    pass


class Conv2d(nn.Conv2d):
    pass


class NormBehind(PreActBlock):
    def forward(self, x):
        return self.bn1(x + self.conv1(x))


class Scaled(PreActBlock):
    def forward(self, x):
        return torch.add(x, self.conv1(x), alpha=0.5)


class BothLinear(PreActBlock):
    def forward(self, x):
        return self.conv1(x) + self.conv2(x)


class DependsOnData(PostActBlock):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class DependsOnMode(PostActBlock):
    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.bn2(self.conv2(out) if self.training else out))


class DropsByFunction(PostActBlock):
    def forward(self, x):
        return F.relu(x + F.dropout(self.bn1(self.conv1(x)), 0.1, self.training))


class AnotherBlockInTraining(PreActBlock):
    def forward(self, x):
        return x + self.conv1(x) if self.training else F.relu(x + self.conv1(x))


class EndsInActivation(PostActBlock):
    def forward(self, x):
        return F.relu(x + F.relu(self.bn1(self.conv1(x))))


class WithoutNorm(PostActBlock):
    def forward(self, x):
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class SharedNorm(PostActBlock):
    def forward(self, x):
        return F.relu(x + self.bn1(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Gated(PostActBlock):
    def forward(self, x):
        out = self.bn1(self.conv1(x))
        return F.relu(x + out * out.sigmoid())


class WithParameter(PostActBlock):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.gain = nn.Parameter(torch.ones(()))


class TwoInputs(PostActBlock):
    def forward(self, x, shortcut=None):
        return super().forward(x)


class AddsByName(PreActBlock):
    def forward(self, x):
        u = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(u))))
        return torch.add(input=out, other=self.shortcut(u))


class ActivatesInPlace(nn.Module):
    """Its ReLU overwrites the input, so a skip that reads the input later would not see it."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, outputs, 3, 1, 1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        u = self.relu(x)
        return torch.tanh(self.conv(u)) + self.shortcut(u)


class PostWithFront(PostActBlock):
    """Post-activation, with a norm in front that both sides read."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs)
        self.front = nn.BatchNorm2d(inputs)

    def forward(self, x):
        u = self.front(x)
        return F.relu(self.bn2(self.conv2(F.relu(self.conv1(u)))) + self.shortcut(u))

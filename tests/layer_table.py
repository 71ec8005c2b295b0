"""The normalised layers, each with torch's own layer, its arguments and the shape of one sample."""

import pytest
from torch import nn

import trainable_nn as tnn

LAYERS = {
    tnn.EntryNormLinear: (nn.Linear, (4, 6), (4,)),
    tnn.WeightNormLinear: (nn.Linear, (4, 6), (4,)),
    tnn.EntryNormConv1d: (nn.Conv1d, (4, 6, 3), (4, 9)),
    tnn.WeightNormConv1d: (nn.Conv1d, (4, 6, 3), (4, 9)),
    tnn.EntryNormConv2d: (nn.Conv2d, (4, 6, 3), (4, 9, 8)),
    tnn.WeightNormConv2d: (nn.Conv2d, (4, 6, 3), (4, 9, 8)),
    tnn.EntryNormConv3d: (nn.Conv3d, (4, 6, 3), (4, 5, 6, 5)),
    tnn.WeightNormConv3d: (nn.Conv3d, (4, 6, 3), (4, 5, 6, 5)),
}
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda cls: cls.__name__)

import sys

import torch

from experiments import recall
from feature_maps import CEIL, FEATURE_MAPS, FLOOR, FeatureMap
from support.cli import run


class Mine(FeatureMap):
    """phi(x) = [relu(x)^2, relu(-x)^2], F = 2 D. The second half keeps the negative part of x, which
    ReLU discards. The square makes the weights spiky."""

    def __init__(self, n_head, head_dim):
        super().__init__(n_head, head_dim)
        self.feature_dim = 2 * head_dim

    def features(self, x, offset):
        return torch.cat([x.relu(), (-x).relu()], -1).square().clamp(max=CEIL) + FLOOR


FEATURE_MAPS["mine"] = Mine

if __name__ == "__main__":
    if "--attentions" not in sys.argv:
        sys.argv += ["--attentions", "softmax", "elu", "mine"]
    run(recall.main)

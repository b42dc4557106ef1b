"""Task 5, 60 minutes and a training run: a feature map of your own. exercises/README.md has the task.

    python -m exercises.my_feature_map                              softmax, 1+ELU and this map
    python -m exercises.my_feature_map --attentions mine hedgehog

This file takes all flags of `python -m experiments.recall`.
"""

import sys

from torch import Tensor

from experiments import recall
from feature_maps import FEATURE_MAPS, FeatureMap
from support.cli import run


class Mine(FeatureMap):
    """phi(x) = ... (write the formula, and why the weights should be spiky and monotonic)"""

    def features(self, x: Tensor, offset: int) -> Tensor:
        """x (B, H, T, D), finite, float32 or float64 -> features (B, H, T, F).

        Every feature must be between FLOOR and CEIL of feature_maps.py. If F is not D, set
        self.feature_dim = F in __init__(self, n_head, head_dim), after the call of super().
        """
        raise NotImplementedError("task 5: return the features")


FEATURE_MAPS["mine"] = Mine  # now attention="mine" works wherever this file was imported

if __name__ == "__main__":
    if "--attentions" not in sys.argv:
        sys.argv += ["--attentions", "softmax", "elu", "mine"]
    run(recall.main)

"""Task 5, 60 minutes and a training run: a feature map of your own on the recall plane. Statement: README.md.

python -m exercises.my_feature_map                                 recall.py with softmax, 1+ELU and this map
python -m exercises.my_feature_map --attentions mine hedgehog      all flags are recall.py's
"""

import sys

from torch import Tensor

from experiments import recall
from feature_maps import FEATURE_MAPS, FeatureMap
from support.cli import run


class Mine(FeatureMap):
    """phi(x) = ... (write the formula here, and why its weights should be spiky and monotonic)"""

    def features(self, x: Tensor, offset: int) -> Tensor:
        """x (B, H, T, D), finite, float32 or float64 -> (B, H, T, F), each between FLOOR and CEIL of feature_maps.py.
        If F is not D, set self.feature_dim = F in __init__(self, n_head, head_dim), after super's."""
        raise NotImplementedError("task 5: return the features")


FEATURE_MAPS["mine"] = Mine  # whoever imports or runs this file can say attention="mine"

if __name__ == "__main__":
    if "--attentions" not in sys.argv:
        sys.argv += ["--attentions", "softmax", "elu", "mine"]
    run(recall.main)

"""One HTML page to play with: a query, keys and four feature maps in two dimensions.

    python -m experiments.feature_map_page        writes docs/feature_map.html

Its script is pages/feature_map.js. It repeats the formulas of feature_maps.py in JavaScript, since the reader
moves their numbers; tests hold the two equal.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.attention_page import page
from support.cli import UserError, parse, run
from support.plots import label
from support.writing import write_atomically

N_KEYS, FEATURES = 24, 4  # points in the plane; columns of W


@dataclass
class PageConfig:
    html: str = "docs/feature_map.html"  # where the page goes

    def check(self) -> None:
        if Path(self.html).is_dir():
            raise UserError(f"--html takes a file, and {self.html} is a folder")


def contents() -> str:
    """The page: keys on a spiral of radius 2.6, and W's columns in four directions, of length 1."""
    golden = math.pi * (3 - math.sqrt(5))  # the angle of a sunflower's seeds: no two points are close
    radii = [2.6 * math.sqrt((j + 0.5) / N_KEYS) for j in range(N_KEYS)]
    keys = [[round(r * f(golden * j), 3) for f in (math.cos, math.sin)] for j, r in enumerate(radii)]
    W = [[round(f(math.pi * i / FEATURES), 3) for i in range(FEATURES)] for f in (math.cos, math.sin)]
    start = {"q": [2.2, -1.4], "t": 2.0, "W": W, "b": [0.0] * FEATURES, "form": "hedgehog_exp"}
    labels = {name: label(name) for name in ("softmax", "elu", "hedgehog", "hedgehog_exp")}
    return page("feature_map", keys=keys, start=start, labels=labels)


def main() -> None:
    config, _ = parse(PageConfig(), sys.argv[1:], __doc__)
    config.check()
    path, text = Path(config.html), contents()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda to: to.write_text(text, encoding="utf-8"))
    print(f"written: {path}, {len(text.encode()) / 1e3:.0f} kB; open it in a browser")


if __name__ == "__main__":
    run(main)

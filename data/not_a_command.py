"""What `python data/NAME.py` says of a file that prepares no data set: one line.

Such a file imports this one before all others. They fail when this folder is first on the path.
"""

import sys
from pathlib import Path

print(
    f"error: data/{Path(sys.argv[0]).name} is not a command: see python -m experiments.glue --help, "
    "python -m experiments.llama --help (dialogues), python -m experiments.lra --help (Long Range Arena), "
    "python data/text.py --help (text)",
    file=sys.stderr,
)
sys.exit(2)

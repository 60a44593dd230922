"""The benchmarks' own arithmetic and parsing; nothing is measured here."""

import sys
from pathlib import Path

# bench is no installed package: it is found from the root of the repository.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

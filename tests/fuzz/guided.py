"""Run one target of targets.py under atheris: ``python -m tests.fuzz.guided NAME [argument ...]``.

The other arguments are libFuzzer's. Owns the choice of the modules whose coverage guides the
fuzzer. One process, one target.
"""

import sys

import atheris

with atheris.instrument_imports(include=["udptun", "tests.reference", "tests.fuzz.targets"]):
    from tests.fuzz.targets import TARGETS

if __name__ == "__main__":
    atheris.Setup([sys.argv[0], *sys.argv[2:]], TARGETS[sys.argv[1]])
    atheris.Fuzz()

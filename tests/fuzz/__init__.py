"""Fuzzing: harnesses of the compiled core (native.pyx) and of parsers in Python (targets.py).

``make fuzz`` runs all of them, ``make fuzz-planted`` shows that each one finds a bug. Each harness
has its corpus in ``corpus/``: one file, one input per line, in base64.
"""

"""Runs ``python -m bench``; see the docstring of the package ``bench``, or --help."""

import sys

from .cli import main

sys.exit(main())

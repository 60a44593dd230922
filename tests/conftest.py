"""What every test shares: how hypothesis runs here.

No deadline, since no test asserts a time; the same examples on every run, so that a red suite is
red again. ``UDPTUN_EXAMPLES=N`` looks further, with new examples each time.
"""

import os

from hypothesis import settings

_MORE = os.environ.get("UDPTUN_EXAMPLES")
settings.register_profile(
    "udptun",
    deadline=None,
    derandomize=_MORE is None,
    max_examples=int(_MORE) if _MORE else 100,
    print_blob=True,
)
settings.load_profile("udptun")

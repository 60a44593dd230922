"""``udptun`` that takes a path back after one second: for tests with many failures in a row.

    python -m tests.netns.short_hold node ...

Normally the wait doubles up to ten minutes. Everything else is the same.
"""

from udptun.cli import main
from udptun.node.paths import choice

if __name__ == "__main__":
    choice.FIRST_HOLD_SECONDS = choice.LAST_HOLD_SECONDS = 1.0
    main()

"""``python -m udptun`` is the ``udptun`` command."""

from .cli import main

if __name__ == "__main__":
    main()

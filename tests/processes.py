"""Child processes of tests: their signals, and whether one has ended."""

from pathlib import Path

# Put before a command that the test sends signals to. A shell starts a background job with SIGINT
# ignored, nohup ignores SIGHUP; children inherit that, and programs leave ignored signals ignored.
DEFAULT_SIGNALS = ("env", "--default-signal=INT,HUP,QUIT")

# Python code that hides from a program that it runs as root.
WITHOUT_ROOT = "import os, sys; os.geteuid = lambda: 65534"


def alive(pid: int) -> bool:
    """Return whether a process runs. A zombie has ended, even if no parent reaps it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False

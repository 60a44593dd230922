"""The suite on other kernels: ``python -m tests.kernels``, or ``make test-kernels``.

    python -m tests.kernels --list             the kernels
    python -m tests.kernels                    the tests on each of them, one after the other
    python -m tests.kernels --kernel 5.10 tests/net tests/netns/test_express.py
    python -m tests.kernels --features         only what each kernel offers; updates docs/kernels.md

Each kernel comes from a package of Debian and runs in a virtual machine of QEMU. The machine has
this host's files, read-only: the same Python, the same udptun, the same tools. So two runs differ
only in the kernel. What the tests write goes to the machine's memory. Needs root, QEMU and the
package lists of a Debian mirror (``debs.py``).
"""

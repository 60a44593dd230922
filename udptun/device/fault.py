"""The one place where a failed system call becomes a DeviceError. Any thread."""

from __future__ import annotations

import os

from ..errors import DeviceError


def device_error(number: int, doing: str, hint: str = "") -> DeviceError:
    """DeviceError with errno ``number``: what was being done, what the kernel said, what helps.

    doing  a phrase such as ``"opening the TUN device udptun0"``
    hint   what a person can do or should know; shown in brackets
    """
    text = f"{doing}: {os.strerror(number)}"
    return DeviceError(number, f"{text} ({hint})" if hint else text)

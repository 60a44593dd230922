"""Turn a failed system call into a DeviceError. Any thread."""

from __future__ import annotations

from ..errors import DeviceError
from ..text import errno_reason


def device_error(number: int, doing: str, hint: str = "") -> DeviceError:
    """Return a DeviceError with errno ``number``. Its text: operation, kernel's error, hint.

    doing  the operation, such as ``"opening the TUN device udptun0"``
    hint   a likely cause or remedy, which is shown in brackets
    """
    text = f"{doing}: {errno_reason(number)}"
    return DeviceError(number, f"{text[:-1]}; {hint})" if hint else text)

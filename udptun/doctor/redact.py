"""Remove secrets from text, and replace addresses and names by pseudonyms.

``Secrets`` is always applied. It removes the secrets that this host's configuration contains, by
their value, and what looks like a secret. ``Pseudonyms`` is for ``--redact``. The same address has
the same pseudonym in every file. An address in a known subnet keeps its place in it: in net-1,
10.244.1.7 is net-1.7.

Owns the patterns. Pure functions of text: no I/O. One thread.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterable

from ..model import IPAddress, IPNetwork

GONE = "***"
SHORTEST = 4  # a shorter secret would also remove other text

# What looks like a secret: the name of an option, a variable or a JSON field that ends with one of
# these words, and its value.
_WORD = r"(?:password|passwd|passphrase|secret|token|credentials?|api[-_]?key|private[-_]?key)"
_VALUE = r"(?:\"(?:\\.|[^\"\\])*\"|'[^']*'|[^\s\"',;&}\]]+)"
_NAMED = re.compile(
    rf"([\w.-]*{_WORD}(?:-data|_data)?[\"']?\s*[=:]\s*|--[\w-]*{_WORD}\s+)(?!\s)({_VALUE})", re.I)
_KEY_DATA = re.compile(
    r"((?:client-key|client-certificate|certificate-authority)-data[\"']?\s*:\s*)"
    rf"({_VALUE})", re.I)
_PEM = re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL)
_USER = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^/\s@\"']+@", re.I)
_QUERY = re.compile(rf"([?&][\w-]*{_WORD}=)[^&\s\"']+", re.I)
_BEARER = re.compile(r"\b((?:Bearer|Basic)\s+)[\w.~+/=-]{8,}", re.I)
_JWT = re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.?[\w-]*")
# The value of such an option is the path of a file, which is no secret.
_IS_FILE = re.compile(r"[-_]?file[\"']?\s*[=:\s]", re.I)


class Secrets:
    """Removes these values, and what looks like a secret."""

    def __init__(self, values: Iterable[str] = ()) -> None:
        self._values: set[str] = set()
        self.add(values)

    def add(self, values: Iterable[str]) -> None:
        for value in values:
            for form in (value, value.strip()):
                if len(form) >= SHORTEST:
                    # The text itself, and its form in JSON.
                    self._values |= {form, json.dumps(form)[1:-1]}

    def remove(self, text: str) -> str:
        for value in sorted(self._values, key=len, reverse=True):
            text = text.replace(value, GONE)
        text = _PEM.sub(f"{GONE} (a key or certificate)", text)
        text = _USER.sub(rf"\1{GONE}@", text)
        text = _QUERY.sub(rf"\1{GONE}", text)
        text = _BEARER.sub(rf"\1{GONE}", text)
        text = _JWT.sub(GONE, text)
        text = _KEY_DATA.sub(rf"\1{GONE}", text)
        return _NAMED.sub(_without_value, text)


def _without_value(found: re.Match[str]) -> str:
    name, value = found.groups()
    if value in ("null", "true", "false") or _IS_FILE.search(name):
        return found.group()
    quote = value[0] if value[:1] in "\"'" else ""
    return f"{name}{quote}{GONE}{quote}"


_IPV4 = re.compile(r"(?<![\w.])(\d{1,3}(?:\.\d{1,3}){3})(?:([/-])(\d{1,2})(?!\d))?(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])((?:[0-9a-f]{0,4}:){2,7}[0-9a-f]{0,4}(?:\d*(?:\.\d{1,3}){3})?)"
                   r"(?:([/-])(\d{1,3})(?!\d))?(?![\w:])", re.I)
_MAC = re.compile(r"(?<![\w:])(?:[0-9a-f]{2}:){5}[0-9a-f]{2}(?![\w:])", re.I)


class Pseudonyms:
    """networks  known networks: the overlay's subnets; names: those of nodes and of this host"""

    def __init__(self, networks: Iterable[IPNetwork], names: Iterable[str]) -> None:
        self._networks: dict[IPNetwork, str] = {}
        self._addresses: dict[IPAddress, str] = {}
        self._others_n = 0  # addresses outside the known networks
        self._macs: dict[str, str] = {}
        for network in networks:
            self._network(network)
        # The longest first, because a name can be a part of another one.
        wanted = sorted({one for one in names if len(one) > 1 and not one.isdigit()},
                        key=lambda one: (-len(one), one))
        self._names = {name: f"node-{number}" for number, name in enumerate(wanted, 1)}
        self._pattern = re.compile(
            r"(?<!\w)(" + "|".join(map(re.escape, wanted)) + r")(?!\w)") if wanted else None

    def replace(self, text: str) -> str:
        text = _MAC.sub(self._of_mac, text)
        text = _IPV4.sub(self._of_match, text)
        text = _IPV6.sub(self._of_match, text)
        if self._pattern is not None:
            text = self._pattern.sub(lambda found: self._names[found.group(1)], text)
        return text

    def _of_mac(self, found: re.Match[str]) -> str:
        mac = found.group().lower()
        if mac in ("00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff"):
            return found.group()
        return self._macs.setdefault(mac, f"mac-{len(self._macs) + 1}")

    def _of_match(self, found: re.Match[str]) -> str:
        text, separator, length = found.groups()
        try:
            address = ipaddress.ip_address(text)
            network = None if length is None else ipaddress.ip_network((address, int(length)))
        except ValueError:  # no address, or an address of a host with the length of its network
            network = None
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                return found.group()
        if _is_public_knowledge(address):
            return found.group()
        tail = "" if length is None else f"{separator}{length}"
        if network is not None and network.prefixlen < network.max_prefixlen:
            return f"{self._network(network)}{tail}"
        return f"{self._address(address)}{tail}"

    def _network(self, network: IPNetwork) -> str:
        return self._networks.setdefault(network, f"net-{len(self._networks) + 1}")

    def _address(self, address: IPAddress) -> str:
        if address not in self._addresses:
            inside = [one for one in self._networks
                      if one.version == address.version and address in one]
            if inside:
                network = max(inside, key=lambda one: one.prefixlen)
                place = int(address) - int(network.network_address)
                self._addresses[address] = f"{self._networks[network]}.{place}"
            else:
                self._others_n += 1
                self._addresses[address] = f"ip-{self._others_n}"
        return self._addresses[address]


def _is_public_knowledge(address: IPAddress) -> bool:
    """Return whether the address says nothing about this network."""
    return address.is_loopback or address.is_unspecified or address.is_multicast or \
        address == ipaddress.ip_address("255.255.255.255")

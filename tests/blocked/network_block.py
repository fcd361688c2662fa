"""Lets only loopback and local sockets connect, by an audit hook that no library can go around in Python."""

from __future__ import annotations

import ipaddress
import sys
from typing import Any


class NetworkBlockedError(OSError):
    """Something tried to leave this machine during a test."""


def _allowed(host: object) -> bool:
    if host in (None, "", b"", "localhost"):
        return True
    try:
        return ipaddress.ip_address(str(host).split("%")[0]).is_loopback
    except ValueError:
        return False


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        address = arguments[1]
        if isinstance(address, tuple) and not _allowed(address[0]):
            raise NetworkBlockedError(f"network blocked in tests: {address}")
    elif event == "socket.getaddrinfo" and not _allowed(arguments[0]):
        raise NetworkBlockedError(f"network blocked in tests: {arguments[0]}")


def install() -> None:
    """Install the hook for the rest of this process."""
    sys.addaudithook(_hook)

"""Whether a server can be reached, told in seconds where its client tries for minutes."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request

TIMEOUT = 10.0
"""Seconds for a connection."""


def check_reachable(url: str) -> None:
    """Connect to a server; with a proxy, that is left to the proxy.

    Raises:
        OSError: it accepts no connection.
    """
    address, proxies = urllib.parse.urlsplit(url), urllib.request.getproxies()
    if proxies.get(address.scheme) or proxies.get("all"):
        return
    port = address.port or (443 if address.scheme == "https" else 80)
    socket.create_connection((address.hostname or "", port), timeout=TIMEOUT).close()

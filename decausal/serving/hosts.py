"""Decides which requests are answered: a page of another site must not reach the server through a visitor's browser.

There are two ways. After its page is loaded, the site's name may resolve to this machine (DNS rebinding). The browser
then takes the server for that site, and `Host` holds the site's name. Or the page sends requests to this machine's
address. Then `Origin` holds the site. Other programs send the host that they call, and no `Origin`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from decausal.serving.errors import ApiError

ANYBODY = "*"


def is_public(host: str) -> bool:
    """Returns whether other machines can reach a server that listens on this host."""
    return not _is_loopback(_plain(host))


class Hosts:
    """The names under which a server may be called.

    Args:
        host: The host on which it listens.
        allowed: Further names; `ANYBODY` allows every one.
    """

    def __init__(self, host: str, allowed: Sequence[str] = ()) -> None:
        self._is_open = ANYBODY in allowed
        addresses = _addresses(host)
        # A server on all addresses of a machine may be called by any of them. No name can imitate an address.
        self._takes_addresses = not host or any(ipaddress.ip_address(each).is_unspecified for each in addresses)
        own = [socket.gethostname()] if self._takes_addresses else [host, *addresses]
        self._names = {_plain(name) for name in (*allowed, *own)}

    def refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> ApiError | None:
        """Returns why a request with these headers is not answered, or None if it is."""
        if self._is_open:
            return None
        given = {name: value.decode("latin-1").strip() for name, value in headers}
        host = _host_of(f"//{given[b'host']}") if b"host" in given else None
        if b"host" in given and not (self._is_known(host) or (self._takes_addresses and _is_address(host))):
            return _refused("is not called", host, given[b"host"])
        origin = _host_of(given[b"origin"]) if b"origin" in given else None
        if b"origin" in given and (origin is None or not (origin == host or self._is_known(origin))):
            return _refused("answers no pages of", origin, given[b"origin"])
        return None

    def _is_known(self, host: str | None) -> bool:
        return host is not None and (host in self._names or _is_loopback(host))


def _refused(what: str, host: str | None, given: str) -> ApiError:
    name = host or "NAME"
    return ApiError(
        403,
        f"this server {what} '{given}': if that is right, start it with --allowed_hosts {name}",
        code="host_not_allowed",
    )


def _host_of(address: str) -> str | None:
    """Returns the host of an address without its port, or None."""
    try:
        host = urlsplit(address).hostname
    except ValueError:
        return None
    return _plain(host) if host and "@" not in address else None


def _plain(host: str) -> str:
    return host.strip("[]").rstrip(".").lower()


def _is_address(host: str | None) -> bool:
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    """Returns whether a name or address means this machine everywhere."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _addresses(host: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
    except OSError:
        return []

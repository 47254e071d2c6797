"""To whom the server answers: a page of another site must not reach it through a visitor's browser.

Two ways lead there. A name of that site may resolve to this machine once its page has been loaded (DNS rebinding): the
browser then takes the server for that site, and `Host` holds its name. Or the page sends requests to this machine's
address: then `Origin` holds it. Programs that are no browsers send the host that they call, and no `Origin`.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

from decausal.serving.errors import ApiError

ANYBODY = "*"


def is_public(host: str) -> bool:
    """Whether others than this machine reach a server that listens there."""
    return not _is_loopback(_plain(host))


class Hosts:
    """The names under which a server is called.

    Args:
        host: Where it listens.
        allowed: Further names; `ANYBODY` allows every one.
    """

    def __init__(self, host: str, allowed: Sequence[str] = ()) -> None:
        self._is_open = ANYBODY in allowed
        addresses = _addresses(host)
        # One that listens on all of a machine's addresses is called by any of them; no name resolves to an address.
        self._takes_addresses = not host or any(ipaddress.ip_address(each).is_unspecified for each in addresses)
        own = [socket.gethostname()] if self._takes_addresses else [host, *addresses]
        self._names = {_plain(name) for name in (*allowed, *own)}

    def refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> ApiError | None:
        """Says why a request with these headers is not answered; None: it is."""
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
    """The host of an address, without its port; None where there is none."""
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
    """A name or an address that is this machine's own everywhere."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    return _is_address(host) and ipaddress.ip_address(host).is_loopback


def _addresses(host: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None)]
    except OSError:
        return []

"""Who may come in: tokens, origins of pages, names of this server, how many of one address."""

from __future__ import annotations

import hmac
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv6Address, ip_address
from urllib.parse import urlsplit

from aiohttp import web

TOKEN_PROTOCOL = "openai-insecure-api-key."
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Gate:
    """Checks requests before anything else is done for them.

    Args:
        tokens: one of which a caller must have, as ``Authorization: Bearer TOKEN`` or ``?token=TOKEN``, or as a
            subprotocol, which is how OpenAI's clients in browsers send it; none are asked for where there are none.
        origins: of pages that may connect besides the server's own, as ``https://example.org``.
        local: whether this server is for its own machine alone. Then it must be called by a name of the machine
            (or of ``origins``): a foreign page whose name was turned to this address is kept out.
    """

    def __init__(self, tokens: Iterable[str] = (), origins: Iterable[str] = (), local: bool = False):
        self._tokens = [token.encode() for token in tokens]
        self._origins = {origin.rstrip("/").lower() for origin in origins}
        self._hosts = {urlsplit(origin).hostname for origin in self._origins} | set(LOOPBACK) if local else None

    def check_origin(self, request: web.BaseRequest) -> None:
        """Raises ``HTTPForbidden`` for pages of other servers, and for other names of this one."""
        host = request.headers.get("Host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            raise web.HTTPForbidden(text=f"the host {host!r} is none of this server; see --allow-origin")
        origin = request.headers.get("Origin")
        if origin is None or origin.lower() in self._origins:
            return
        if not host or _netloc(origin) != host.lower():
            raise web.HTTPForbidden(text=f"pages of {origin!r} may not connect; see --allow-origin")

    def check_token(self, request: web.BaseRequest) -> None:
        """Raises ``HTTPUnauthorized`` for a caller without a token."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.query.get("token") or _key_among(request.headers.get("Sec-WebSocket-Protocol", ""))
        # every token is compared, each in constant time
        matches = [hmac.compare_digest(given.encode("utf-8", "replace"), token) for token in self._tokens]
        if self._tokens and not any(matches):
            raise web.HTTPUnauthorized(
                text="a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN",
                headers={"WWW-Authenticate": "Bearer"},
            )


class Addresses:
    """Limits the dialogues that callers of one address have or wait for, a network of 64 bits for IPv6.

    Args:
        most: at once; None does not limit them.
    """

    def __init__(self, most: int | None = None):
        self._most = most
        self._held: Counter[str] = Counter()

    def check(self, remote: str | None) -> None:
        """Raises ``HTTPTooManyRequests`` if an address has as many as it may."""
        if self._most is not None and self._held[_network(remote)] >= self._most:
            words = f"your address has {self._most} of {self._most} dialogues already; end one, or try again later"
            raise web.HTTPTooManyRequests(text=words)

    @contextmanager
    def hold(self, remote: str | None) -> Iterator[None]:
        """A dialogue of an address. Raises as :meth:`check`."""
        self.check(remote)
        network = _network(remote)
        self._held[network] += 1
        try:
            yield
        finally:
            self._held[network] -= 1
            if not self._held[network]:
                del self._held[network]


def _network(remote: str | None) -> str:
    """What callers cannot choose freely of their address."""
    try:
        address = ip_address((remote or "").partition("%")[0])
    except ValueError:
        return remote or ""  # a socket of the system's own
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            return address.exploded[:19]
        address = address.ipv4_mapped
    return str(address)


def _key_among(protocols: str) -> str:
    """The token among the subprotocols that a client offers, or nothing."""
    names = [name.strip() for name in protocols.split(",")]
    return next((name.removeprefix(TOKEN_PROTOCOL) for name in names if name.startswith(TOKEN_PROTOCOL)), "")


def _netloc(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None

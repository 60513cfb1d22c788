"""Who may come in: tokens, origins of pages, names of this server."""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from urllib.parse import urlsplit

from aiohttp import web

LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Gate:
    """Checks requests before anything else is done for them.

    Args:
        tokens: one of which a caller must have, as ``Authorization: Bearer TOKEN`` or ``?token=TOKEN``; none are asked
            for where there are none.
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
        if urlsplit(origin).netloc.lower() != host.lower() or not host:
            raise web.HTTPForbidden(text=f"pages of {origin!r} may not connect; see --allow-origin")

    def check_token(self, request: web.BaseRequest) -> None:
        """Raises ``HTTPUnauthorized`` for a caller without a token."""
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = request.query.get("token", "")
        # every token is compared, each in constant time
        matches = [hmac.compare_digest(given.encode("utf-8", "replace"), token) for token in self._tokens]
        if self._tokens and not any(matches):
            raise web.HTTPUnauthorized(
                text="a token is needed: Authorization: Bearer TOKEN, or ?token=TOKEN",
                headers={"WWW-Authenticate": "Bearer"},
            )


def _hostname(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None

"""Who may come in: what a request says of where it is sent and from where."""

from __future__ import annotations

import hmac
import ipaddress
import re

from aiohttp import web

# A name or an address and perhaps a port, as browsers write them: no user, no zone, no dot behind.
_HOST = re.compile(r"(?P<name>[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(?::(?P<port>[0-9]{1,5}))?", re.ASCII)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(header: str) -> str | None:
    """The name or address in a Host header, in lower case and without brackets; None if it is not one."""
    found = _HOST.fullmatch(header.lower())
    if found is None or int(found["port"] or 0) > 65535:
        return None
    name = found["name"]
    if not name.startswith("["):
        return name
    try:
        return str(ipaddress.IPv6Address(name[1:-1]))
    except ValueError:
        return None


def is_welcome(request: web.BaseRequest, host: str, token: str | None) -> bool:
    """May this be followed?

    Args:
        request: of which headers, query and cookies are looked at.
        host: that we listen at.
        token: that must be known; None: none, but then the request must be sent to this machine by its name.
    """
    hosts, origins = (request.headers.getall(name, []) for name in ("Host", "Origin"))
    if len(hosts) != 1 or len(origins) > 1 or (name := host_of(hosts[0])) is None:
        return False
    if origins and origins[0].lower() not in [f"{scheme}://{hosts[0].lower()}" for scheme in ("http", "https")]:
        return False
    if token is None:
        return is_loopback(name) or name == host.lower()
    given = request.query.get("token") or request.cookies.get("inferix") or ""
    try:
        return hmac.compare_digest(given.encode(), token.encode())
    except UnicodeEncodeError:  # bytes that are no text
        return False

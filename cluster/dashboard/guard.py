"""Who may ask a page's server.

A page elsewhere on the web can make a browser ask loopback by a name of its own (DNS rebinding), so
only names that mean this host are answered.  Whoever listens beyond loopback needs a token.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import socket
from http.cookies import CookieError, SimpleCookie


class Guard:
    """The rules of one server.

    Parameters
    ----------
    address, port
        What it listens on.
    """

    def __init__(self, address: str, port: int) -> None:
        # browsers send a host's cookies to all of its ports: two servers there need two names
        self.cookie = f"neurojepa-dashboard-{port}"
        self.token = None if is_loopback(address) else secrets.token_urlsafe(32)
        self._names = {"localhost", address.lower(), socket.gethostname().lower(),
                       socket.getfqdn().lower()} if self.token else {"localhost"}

    def knows_host(self, header: str | None) -> bool:
        """Whether a Host header names this server; numbers always do, for no one else owns them."""
        name = (header or "").strip().lower()
        name = name[1:name.find("]")] if name.startswith("[") else name.partition(":")[0]
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in self._names

    def is_token(self, given: str) -> bool:
        """Whether it is the token; takes equally long for every wrong one."""
        return self.token is not None and hmac.compare_digest(given.encode(), self.token.encode())

    def admits(self, cookies: str | None) -> bool:
        """Whether a request that brings these cookies is answered."""
        if self.token is None:
            return True
        try:
            found = SimpleCookie(cookies or "").get(self.cookie)
        except CookieError:
            return False
        return found is not None and self.is_token(found.value)


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == "localhost"

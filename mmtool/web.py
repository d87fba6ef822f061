"""One question over HTTP to one place: what a URL names, how it is reached, who asks, whose certificates count."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import ipaddress
import netrc
import os
import re
import socket
import ssl
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mmtool.errors import MediaError
from mmtool.utils import printable

# Some hosts refuse the name that Python's library would give. One question per connection: nothing is asked after it.
_HEADERS = {"User-Agent": "mmtool", "Accept": "image/*,*/*;q=0.5", "Accept-Encoding": "identity", "Connection": "close"}
_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[\w.~!$&'()*+,;=:%-]+", re.ASCII)
# The older rules for names, which Python's codec has, make other letters of these than the newer ones: another host.
_AMBIGUOUS = frozenset("ßς\u200c\u200d")
_SAFE = "!#$%&'()*+,/:;=?@[]~"  # stay as they are in a path; all else that is no letter or digit is quoted
_CA_VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")  # OpenSSL itself reads SSL_CERT_FILE and SSL_CERT_DIR


@dataclass(frozen=True)
class Place:
    """What a URL names.

    Attributes:
        tls: whether it begins with ``https``.
        host: name in ASCII, or address; an IPv6 address has no brackets.
        port: the scheme's own where the URL names none.
        path: with the query, quoted.
        login: ``user:password``, or empty.
    """

    tls: bool
    host: str
    port: int
    path: str
    login: str

    def authority(self, port: bool = False) -> str:
        """Return host and port as they stand in a URL; the scheme's own port only with ``port``."""
        host = self.host.partition("%")[0]
        host = f"[{host}]" if ":" in host else host
        return f"{host}:{self.port}" if port or self.port != _PORTS[self.scheme] else host

    @property
    def scheme(self) -> str:
        """``http`` or ``https``."""
        return "https" if self.tls else "http"


def place_of(url: str) -> Place:
    """Take a URL of ``http`` or ``https`` apart.

    Raises:
        ValueError: for one that cannot be asked.
    """
    parts = urllib.parse.urlsplit(url)
    if "\\" in parts.netloc:
        raise ValueError("the host has a backslash")  # some readers of URLs end the host there, others do not
    tls = parts.scheme.lower() == "https"
    port = parts.port
    path = urllib.parse.quote(parts.path or "/", safe=_SAFE)
    if not path.startswith("/"):
        raise ValueError("no URL of a file")
    if parts.query:
        path += "?" + urllib.parse.quote(parts.query, safe=_SAFE)
    login = ""
    if parts.username is not None:
        login = f"{urllib.parse.unquote(parts.username)}:{urllib.parse.unquote(parts.password or '')}"
    return Place(
        tls, _ascii(parts.hostname or ""), _PORTS["https" if tls else "http"] if port is None else port, path, login
    )


def _ascii(host: str) -> str:
    if _AMBIGUOUS & set(host):
        raise ValueError("the host has a letter that has two meanings in names; write it in ASCII, as xn--...")
    if not host.isascii():
        host = host.encode("idna").decode()
    if not _HOST.fullmatch(host):
        raise ValueError("the URL names no host")
    return host.replace("%25", "%") if ":" in host else host  # what a URL makes of the % in an address with a zone


def proxy_for(place: Place) -> Place | None:
    """Return the proxy that the environment names for ``place``: ``http_proxy`` and the like, unless ``no_proxy``.

    Raises:
        MediaError: for a proxy of another kind than ``http://``.
    """
    found = urllib.request.getproxies()
    proxy = found.get(place.scheme) or found.get("all")
    if not proxy or _spared(place, found.get("no", "")):
        return None
    scheme, separator, _ = proxy.partition("://")
    if not separator:
        scheme, proxy = "http", f"http://{proxy}"
    if scheme.lower() != "http":
        raise MediaError(
            f"the environment names a proxy of kind {printable(scheme)[:20]}://, which is not supported",
            "Name one of kind http://, put the host into NO_PROXY, or download it and give the path.",
        )
    return place_of(proxy)


def _spared(place: Place, no_proxy: str) -> bool:
    if any(urllib.request.proxy_bypass(name) for name in (place.host, f"{place.host}:{place.port}")):
        return True
    with contextlib.suppress(ValueError):  # a name is in no network
        address = ipaddress.ip_address(place.host)
        for network in no_proxy.split(","):
            with contextlib.suppress(ValueError):  # an entry that is no network
                if address in ipaddress.ip_network(network.strip(), strict=False):
                    return True
    return False


def stored_login(host: str) -> str:
    """Return ``user:password`` for ``host`` from the file that ``NETRC`` names, or ``~/.netrc``; else nothing."""
    paths = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for path in map(os.path.expanduser, paths):
        with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
            if found := netrc.netrc(path).authenticators(host):
                return f"{found[0]}:{found[2] or ''}"
    return ""


def certificates() -> str | None:
    """Return the file or folder of trusted certificates that the environment names, if it does.

    Raises:
        MediaError: where it names one that is not there.
    """
    for name in _CA_VARIABLES:
        if path := os.environ.get(name):
            if not os.path.exists(path):
                raise MediaError(f"there is no {printable(path)}, which {name} names", f"Correct or unset {name}.")
            return path
    return None


class Connection(http.client.HTTPConnection):
    """Asks one place one question; its socket is made by ``connect_to``, the name in TLS and in Host is the place's."""

    def __init__(
        self,
        place: Place,
        connect_to: Callable[[str, int], socket.socket],
        proxy: Place | None = None,
        bundle: str | None = None,
    ) -> None:
        """Connect nowhere yet.

        Args:
            place: whom to ask.
            connect_to: makes the socket, from host and port.
            proxy: goes between, over plain HTTP.
            bundle: file or folder of the certificates to trust; None trusts those of the system.
        """
        super().__init__(place.host, place.port)
        self.place, self.connect_to, self.proxy, self.bundle = place, connect_to, proxy, bundle

    def ask(self, method: str, login: str) -> None:
        """Connect and send the question, with ``login`` where there is one."""
        target, headers = self.place.path, {"Host": self.place.authority(), **_HEADERS}
        if login:
            headers["Authorization"] = _basic(login)
        if self.proxy is not None and not self.place.tls:
            target = f"http://{self.place.authority()}{target}"
            if self.proxy.login:
                headers["Proxy-Authorization"] = _basic(self.proxy.login)
        self.request(method, target, headers=headers)

    def connect(self) -> None:
        """Make the connection, through the proxy where there is one."""
        first = self.proxy or self.place
        sock = self.connect_to(first.host, first.port)
        try:
            if self.place.tls:
                if self.proxy is not None:
                    self._tunnel_to_place(sock)
                name = self.place.host.partition("%")[0].rstrip(".")
                sock = _tls(self.bundle).wrap_socket(sock, server_hostname=name)
        except BaseException:
            sock.close()
            raise
        self.sock = sock

    def _tunnel_to_place(self, sock: socket.socket) -> None:
        place = self.place.authority(port=True)
        lines = [f"CONNECT {place} HTTP/1.1", f"Host: {place}", f"User-Agent: {_HEADERS['User-Agent']}"]
        if self.proxy is not None and self.proxy.login:
            lines.append(f"Proxy-Authorization: {_basic(self.proxy.login)}")
        sock.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
        with contextlib.closing(http.client.HTTPResponse(sock, method="CONNECT")) as response:
            response.begin()
            if response.status != 200:
                reason = f"{response.status} {printable(response.reason)[:100]}".rstrip()
                raise MediaError(f"the proxy answered {reason}", "Check the proxy, or download it and give the path.")


def _basic(login: str) -> str:
    return "Basic " + base64.b64encode(login.encode()).decode()


@functools.lru_cache(maxsize=4)  # reading all certificates takes some 20 ms
def _tls(bundle: str | None) -> ssl.SSLContext:
    if bundle is not None:
        folder = os.path.isdir(bundle)
        context = ssl.create_default_context(cafile=None if folder else bundle, capath=bundle if folder else None)
    else:
        context = _system_tls()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _system_tls() -> Any:
    paths = ssl.get_default_verify_paths()
    if paths.cafile or paths.capath or sys.platform == "win32":
        return ssl.create_default_context()
    # Python from python.org for macOS has none; huggingface_hub always brings one of these packages.
    with contextlib.suppress(ModuleNotFoundError):
        import certifi

        return ssl.create_default_context(cafile=certifi.where())
    with contextlib.suppress(ModuleNotFoundError):
        import truststore

        return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return ssl.create_default_context()

"""Fetch a URL with one deadline for everything, a size limit, and, for servers, public addresses only.

On Python's own ``http.client``: every socket is ours to make, no package is needed, and nothing has to be loaded that
``mmtool.media`` has not loaded already.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import threading
import time
import urllib.parse
import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import Any, NoReturn

from mmtool import web
from mmtool.errors import MediaError
from mmtool.utils import printable

MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 64 * 1024
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Networks for special purposes that some versions of Python take for public ones.
_SPECIAL = [
    ipaddress.ip_network(text)
    for text in (
        *("192.0.0.0/24", "192.88.99.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.175.48.0/24"),
        *("64:ff9b:1::/48", "100::/64", "2001::/23", "2620:4f:8000::/48", "3fff::/20", "5f00::/16", "fec0::/10"),
    )
]
_CHECK = "Check the URL, or download it and give the path."


def fetch(
    url: str,
    *,
    timeout: float,
    max_bytes: int,
    allow_private: bool = True,
    schemes: Collection[str] = ("http", "https"),
    domains: Collection[str] | None = None,
) -> bytes:
    """Return the body of ``url``.

    Args:
        url: http or https; so must be what it redirects to, ``MAX_REDIRECTS`` times at most.
        timeout: seconds for all of it, from looking up the name to the last byte.
        max_bytes: most bytes of the body.
        allow_private: whether addresses that are not public are fine. If not, each name is looked up once, all its
            addresses are checked, the connection goes to one of these, and proxies of the environment are not used.
        schemes: what URLs may begin with, those of redirects too.
        domains: hosts that may be asked, also after a redirect: names, addresses, ``*.example.com`` for all names below
            one. None is any host.

    Raises:
        MediaError: with the reason; the message does not name the URL.
    """
    return _Download(url, timeout, max_bytes, allow_private, schemes, domains).run()


def reachable(url: str, *, timeout: float) -> bool:
    """Tell whether anything answers at ``url``, whatever it says, within ``timeout`` seconds."""
    try:
        _Download(url, timeout, 0, True, ("http", "https"), None, method="HEAD").run()
    except MediaError:
        return False
    return True


def is_listed(host: str, domains: Collection[str]) -> bool:
    """Tell whether a host is one of ``domains``, which may begin with ``*.``; case and a last dot do not count."""
    host = host.lower().rstrip(".")
    for domain in map(str.lower, domains):
        if host == domain.strip("[]") or (domain.startswith("*.") and host.endswith(domain[1:])):
            return True
    return False


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the public internet; IPv4 addresses inside IPv6 ones are looked at."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    if any(ip in network for network in _SPECIAL if network.version == ip.version):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_link_local or ip.is_loopback)


class _Download:
    """One fetch, done in a thread of its own.

    Looking up a name cannot be interrupted, and a server may send its head or its body one byte at a time. So the
    caller waits for the thread until the deadline and no longer; shutting the sockets then ends the thread too.
    """

    def __init__(
        self,
        url: str,
        timeout: float,
        max_bytes: int,
        allow_private: bool,
        schemes: Collection[str],
        domains: Collection[str] | None,
        method: str = "GET",
    ) -> None:
        self.url, self.timeout, self.max_bytes, self.allow_private = url, timeout, max_bytes, allow_private
        self.schemes, self.domains, self.method = schemes, domains, method
        # Proxies, logins and certificates of the environment are for people; a proxy would look names up on its own.
        self.trust_environment = allow_private and domains is None
        self.deadline = time.monotonic() + timeout
        self.sockets: list[socket.socket] = []
        self.lock = threading.Lock()
        self.stopped = False
        self.data: bytes | None = None
        self.error: BaseException | None = None

    def run(self) -> bytes:
        thread = threading.Thread(target=self._work, name="mmtool-download", daemon=True)
        thread.start()
        try:
            thread.join(self.timeout)
        finally:
            self._stop()
        if self.error is not None:
            raise self.error
        if self.data is None:
            raise MediaError(
                f"no complete answer within {self.timeout:g} s", "Try again, or download it and give the path."
            )
        return self.data

    def _work(self) -> None:
        try:
            data = self._follow()
            if not self.stopped:  # else its end may be our own doing
                self.data = data
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a URL that cannot be parsed
            if not self.stopped:
                self.error = MediaError(_reason(error), _CHECK)
        except BaseException as error:  # raised again in the thread that waits
            if not self.stopped:
                self.error = error

    def _follow(self) -> bytes:
        url = self.url
        for hop in range(MAX_REDIRECTS + 1):
            self._check_url(url, "it redirects to" if hop else "it is")
            with contextlib.closing(self._ask(url)) as connection, connection.getresponse() as response:
                if self.method == "HEAD":
                    return b""
                target = response.headers["Location"] if response.status in _REDIRECTS else None
                if target is None:
                    return self._read(response)
            url = urllib.parse.urljoin(url, target.encode("latin-1").decode())  # headers are read as Latin-1
        raise MediaError(f"it redirects more than {MAX_REDIRECTS} times", _CHECK)

    def _ask(self, url: str) -> web.Connection:
        place = web.place_of(url)
        proxy, login, bundle = None, place.login, None
        if self.trust_environment:
            proxy, login = web.proxy_for(place), login or web.stored_login(place.host)
            bundle = web.certificates() if place.tls else None
        connection = web.Connection(place, self.connect, proxy, bundle)
        try:
            connection.ask(self.method, login)
        except BaseException:
            connection.close()
            raise
        return connection

    def _check_url(self, url: str, found: str) -> None:
        scheme = urllib.parse.urlsplit(url).scheme.lower()
        if scheme not in self.schemes:
            only = " and ".join(f"{name}://" for name in self.schemes)
            raise MediaError(f"{found} {_an(scheme)} address", f"Only {only} may be fetched from here.")

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != 200:
            raise MediaError(f"the server answered {response.status} {printable(response.reason)}".rstrip(), _CHECK)
        announced = response.headers.get("Content-Length", "")
        if announced.isdecimal() and int(announced) > self.max_bytes:
            self._refuse_size()
        data = bytearray()
        for piece in _unpacked(self._pieces(response), response.headers.get("Content-Encoding", "")):
            data += piece
            if len(data) > self.max_bytes:
                self._refuse_size()
        return bytes(data)

    def _pieces(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        """Give the body as it is sent, up to the limit: what is packed could unpack to nothing for ever."""
        # Into a buffer of ours: read() would take the announced size of a chunk, -1 too, for what to read at once.
        buffer = memoryview(bytearray(_CHUNK))
        received = 0
        try:
            while count := response.readinto(buffer):
                received += count
                if received > self.max_bytes:
                    self._refuse_size()
                yield bytes(buffer[:count])
        except http.client.IncompleteRead:
            raise MediaError("the server sent it in pieces, and not to its end", _CHECK) from None
        if response.length:
            raise MediaError(f"the connection ended {response.length} bytes before the end of the file", _CHECK)

    def _refuse_size(self) -> NoReturn:
        raise MediaError(f"larger than the limit of {self.max_bytes / 2**20:.3g} MiB", "Use a smaller file.")

    def connect(self, host: str, port: int) -> socket.socket:
        """Look up ``host``, check its addresses, and connect to the first that answers."""
        host = host.strip("[]")
        name = printable(host)[:80]
        # Here and not where the URL is read: this is the host that the connection really goes to.
        if self.domains is not None and not is_listed(host, self.domains):
            raise MediaError(f"{name} is not one of the hosts that may be asked", "Send the file as a data URI.")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise MediaError(f"the host {name} is not known", _CHECK) from None
        refused = [address[0] for *_, address in found if not is_public(str(address[0]))]
        if refused and not self.allow_private:
            raise MediaError(f"{name} is not a public address", "Only public servers may be fetched from here.")
        failure: OSError | None = None
        for family, kind, protocol, _, address in found:
            try:
                return self._connected(socket.socket(family, kind, protocol), address)
            except OSError as error:
                failure = error
        raise MediaError(f"cannot connect to {name}:{port} ({_reason(failure)})", _CHECK)

    def _connected(self, sock: socket.socket, address: Any) -> socket.socket:
        try:
            sock.settimeout(self._left())
            sock.connect(address)
            with self.lock:
                if self.stopped:
                    raise OSError("stopped")
                # A copy, because TLS takes the socket over; shutting the copy shuts the connection.
                self.sockets.append(sock.dup())
        except OSError:
            sock.close()
            raise
        return sock

    def _left(self) -> float:
        # One second more than there is: the thread that waits decides when time is up.
        return max(self.deadline - time.monotonic(), 0) + 1

    def _stop(self) -> None:
        with self.lock:
            self.stopped = True
            for sock in self.sockets:
                with contextlib.suppress(OSError):  # closed by the other side
                    sock.shutdown(socket.SHUT_RDWR)
                sock.close()


def _unpacked(pieces: Iterable[bytes], packing: str) -> Iterator[bytes]:
    """Undo the packing that some servers do without being asked, at most ``_CHUNK`` bytes at a time."""
    packing = packing.strip().lower()
    if packing in ("", "identity"):
        yield from pieces
        return
    if packing not in ("gzip", "x-gzip", "deflate"):
        raise MediaError(f"the server sent it packed as {printable(packing)[:40]}", _CHECK)
    unpacker = _unpacker()
    try:
        for rest in pieces:
            piece = b""
            while rest or len(piece) == _CHUNK:
                if unpacker.eof and rest:
                    unpacker = _unpacker()  # several files, one after the other, are one
                piece = unpacker.decompress(rest, _CHUNK)
                rest = unpacker.unused_data if unpacker.eof else unpacker.unconsumed_tail
                yield piece
    except zlib.error as error:
        raise MediaError(
            f"the server sent it packed, and that cannot be unpacked ({printable(str(error))})", _CHECK
        ) from None
    if not unpacker.eof:
        raise MediaError("the server sent it packed, and not to its end", _CHECK)


def _unpacker() -> Any:
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, as its first bytes say


def _reason(error: BaseException | None) -> str:
    """Return the innermost of nested errors in a few words."""
    while error is not None:
        inner = [arg for arg in (*error.args, getattr(error, "reason", None)) if isinstance(arg, BaseException)]
        if not inner:
            break
        error = inner[0]
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return printable(text)[:150]


def _an(scheme: str) -> str:
    name = printable(scheme)[:20]
    return f"an {name}" if name[:1] in tuple("aeiouh") and name else f"a {name or 'nameless'}"

"""Where the hub of the control channel listens, and the endpoint that its peers are told and connect to."""

from __future__ import annotations

import ipaddress
import re
import socket as sockets
import tempfile
from contextlib import suppress
from pathlib import Path

import zmq

from .errors import SyncError

MAX_SOCKET_PATH = 100  # of the 107 bytes that a Unix socket's address may have
WILDCARDS = ("*", "0.0.0.0", "::")
_TCP = re.compile(r"tcp://(?:\[(?P<ipv6>[^\[\]]+)\]|(?P<host>[^:\[\]/]+)):(?P<port>\*|\d{1,5})")


def listening_address(address: str, *, may_be_remote: bool) -> str:
    """`address` as ZMQ takes it, names resolved: "tcp://HOST:PORT" (port "*" for a free one) or "ipc:///PATH".

    Raises SyncError for anything else, for a TCP address beyond loopback unless `may_be_remote`, and for a path that
    exists: ZMQ would unlink it.
    """
    if address.startswith("ipc://"):
        path = Path(address.removeprefix("ipc://"))
        if not path.is_absolute():
            raise _error(f"expected an absolute path in the address of a Unix socket, found {address!r}")
        if path.exists() or path.is_symlink():
            raise _error(f"cannot listen on {address}: the path exists. Remove it, or choose another")
        return address
    host, port = _host_and_port(address)
    host = _resolved(host, address)
    if not may_be_remote and not _is_loopback(host):
        raise _error(
            f"{address} can be reached from other hosts. Pass it as bind= if that is wanted, with key= for encryption"
        )
    return _tcp(host, port)


def is_remote(endpoint: str) -> bool:
    """Whether other hosts can reach it."""
    return endpoint.startswith("tcp://") and not _is_loopback(_host_and_port(endpoint)[0])


def peers_endpoint(bound: str, advertise: str | None) -> str:
    """What peers connect to, of a socket bound to `bound`.

    Raises SyncError if that is every address of the host and `advertise` does not choose one.
    """
    if not bound.startswith("tcp://"):
        if advertise is not None:
            raise _error(f"advertise={advertise!r} has no meaning for {bound}")
        return bound
    host, port = _host_and_port(bound)
    if advertise is None and host in WILDCARDS:
        raise _error(
            f"{bound} stands for every address of this host, which peers cannot connect to: pass advertise=, the name "
            "or address by which they reach it"
        )
    endpoint = bound if advertise is None else _tcp(advertise.strip("[]"), port)
    if _host_and_port(endpoint)[0] in WILDCARDS:
        raise _error(f"peers cannot connect to advertise={advertise!r}")
    return endpoint


def numeric_host(endpoint: str) -> str:
    """The numeric address in `endpoint`; loopback for a Unix socket. Raises SyncError if its name is unknown."""
    return _resolved(_host_and_port(endpoint)[0], endpoint) if endpoint.startswith("tcp://") else "127.0.0.1"


def listen(socket: zmq.Socket[bytes], address: str) -> None:
    """Bind `socket` to what `listening_address` returned. A Unix socket is this user's only. Raises SyncError."""
    try:
        socket.setsockopt(zmq.IPV6, _needs_ipv6(address))
        socket.bind(address)
        if address.startswith("ipc://"):
            Path(address.removeprefix("ipc://")).chmod(0o600)
    except (zmq.ZMQError, OSError) as error:
        raise _error(f"cannot listen on {address}: {error.strerror}") from error


def connect(socket: zmq.Socket[bytes], endpoint: str) -> None:
    """Connect `socket` to a hub's endpoint. Raises SyncError if that is none."""
    try:
        socket.setsockopt(zmq.IPV6, _needs_ipv6(endpoint))
        socket.connect(endpoint)
    except zmq.ZMQError as error:
        raise _error(f"cannot connect to {endpoint}: {error.strerror}") from error


def _needs_ipv6(endpoint: str) -> bool:
    """Whether a socket must speak IPv6 to use `endpoint`: an IPv6 address, or a name without an IPv4 address."""
    if not endpoint.startswith("tcp://"):
        return False
    host, _ = _host_and_port(endpoint)
    if ":" in host:
        return True
    try:
        sockets.getaddrinfo(host, None, sockets.AF_INET)
    except OSError:
        try:
            return bool(sockets.getaddrinfo(host, None, sockets.AF_INET6))
        except OSError:
            return False
    return False


def private_directory() -> Path:
    """A new directory that only this user can enter (mode 0700), with a path short enough for a Unix socket."""
    for parent in (None, "/tmp"):
        path = Path(tempfile.mkdtemp(prefix="mbridge-", dir=parent))
        if len(str(path)) < MAX_SOCKET_PATH - len("/control"):
            return path
        with suppress(OSError):
            path.rmdir()
    raise _error("no directory with a path short enough for a Unix socket; set TMPDIR, or pass control_address")


def _host_and_port(address: str) -> tuple[str, str]:
    match = _TCP.fullmatch(address)
    if match is None:
        raise _error(f"expected tcp://HOST:PORT, tcp://[IPV6]:PORT or ipc:///PATH, found {address!r}")
    return match["ipv6"] or match["host"], match["port"]


def _resolved(host: str, address: str) -> str:
    """A numeric address, a wildcard or the name of an interface: what ZMQ can bind."""
    if host == "*":
        return "0.0.0.0"
    with suppress(ValueError):
        return str(ipaddress.ip_address(host))
    if host in (name for _, name in sockets.if_nameindex()):
        return host
    try:
        found = sockets.getaddrinfo(host, None, type=sockets.SOCK_STREAM)
    except OSError as error:
        raise _error(f"cannot listen on {address}: {host!r} has no address ({error.strerror})") from error
    return str(found[0][4][0])


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tcp(host: str, port: str) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _error(message: str) -> SyncError:
    return SyncError(message, phase="connect")

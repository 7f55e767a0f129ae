"""The address by which this machine talks to the other ranks, and the network interface that carries it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterator

import psutil

from partition.errors import ClusterError, ConfigError

_ANY_PORT = 9  # a datagram socket that is connected sends nothing


def own_address(wanted: str | None, towards: str) -> str:
    """An IPv4 address of this machine. wanted: `cluster.interface`, an interface or a network; None: whatever the
    kernel's routes take to reach the host `towards`.

    Raises:
        ConfigError: this machine has no such interface, or no address in that network.
        ClusterError: there is no route to `towards`.
    """
    if wanted is not None:
        return _address_of(wanted)
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((towards, _ANY_PORT))
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ClusterError(
            f"{socket.gethostname()} has no route to {towards} ({error}): check the network, or name what to use with "
            "cluster.interface"
        ) from error


def interface_of(host: str) -> str:
    """The network interface that carries this address of this machine. Raises ClusterError when none does."""
    address = socket.gethostbyname(host)
    for name, own in _addresses():
        if own == address:
            return name
    raise ClusterError(f"no network interface of this machine has the address {address}")


def _address_of(wanted: str) -> str:
    found = list(_addresses())
    there = ", ".join(f"{name} {address}" for name, address in found)
    if "/" in wanted:
        try:
            network = ipaddress.ip_network(wanted, strict=False)
        except ValueError as error:
            raise ConfigError(f"cluster.interface: {wanted!r} is no network: {error}") from error
        matching = [address for _, address in found if ipaddress.ip_address(address) in network]
    else:
        matching = [address for name, address in found if name == wanted]
    if not matching:
        raise ConfigError(
            f"cluster.interface: {wanted}, but {socket.gethostname()} has {there}: name an interface, or a network "
            "that every node has an address in"
        )
    return matching[0]


def _addresses() -> Iterator[tuple[str, str]]:
    """(interface, IPv4 address) of this machine."""
    for name, addresses in psutil.net_if_addrs().items():
        for item in addresses:
            if item.family == socket.AF_INET:
                yield name, item.address

"""By which network this host reaches another (L2, no torch)."""

import socket
from collections.abc import MutableMapping, Sequence

import psutil

CHOICES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name the interface for gloo and for NCCL's first contact."""


def interfaces() -> dict[str, str]:
    """Name -> first IPv4 address of every interface of this host, loopback included."""
    return {
        name: next(a.address for a in addresses if a.family == socket.AF_INET)
        for name, addresses in psutil.net_if_addrs().items()
        if any(a.family == socket.AF_INET for a in addresses)
    }


def outward(host: str) -> str:
    """This host's own address on the way to another, given by name or address; "": no way known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Sends nothing, but the address is bound from which a packet would leave.
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
        except OSError:
            return ""


def interface_of(address: str) -> str:
    """The interface that has this address, "" for none and for loopback."""
    found = "" if address.startswith("127.") else address
    return next((name for name, at in interfaces().items() if found and at == found), "")


def choose_interface(
    rank: int,
    hosts: Sequence[str],
    addresses: Sequence[str],
    master: str,
    environ: MutableMapping[str, str],
) -> None:
    """Sets CHOICES on one rank of several hosts to the interface by which it reaches rank 0, or on
    rank 0's own host another one; what was exported stays.

    Where a host's name stands for 127.0.1.1 in its /etc/hosts, gloo would not leave the host.

    hosts: name of every rank's host. addresses: `outward(master)` of every rank.
    """
    peer = master
    if hosts[rank] == hosts[0]:
        others = (a for host, a in zip(hosts, addresses, strict=True) if host != hosts[0])
        peer = next((a for a in others if a and not a.startswith("127.")), "")
    name = interface_of(outward(peer)) if peer and len(set(hosts)) > 1 else ""
    for variable in CHOICES if name else ():
        environ.setdefault(variable, name)

"""By which network do the ranks of several hosts reach each other?"""

import resource
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from megagpt.check.findings import FAIL, OK, WARN, Check, Order
from megagpt.cluster.interface import interface_of, interfaces, outward

LOCKED = 1 << 30
"""Bytes that InfiniBand may have to lock; anything less than unlimited is asking for trouble."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A host's names and addresses."""

    host: str
    address: str
    """What the host's own name resolves to; empty: it does not."""
    interfaces: Mapping[str, str]
    """Name -> IPv4 address, loopback included."""
    outward: str = ""
    """The interface by which this host reaches rank 0; empty: not known, or loopback."""


def check_network(order: Order, environ: Mapping[str, str]) -> Iterator[Check]:
    """All checks of the network that one host can make."""
    net, hosts = look(order.master), order.hosts
    if order.gpus_per_node and any(not at.startswith("127.") for at in net.interfaces.values()):
        # A job that is not queued yet, of which this host may be one.
        hosts = max(hosts, order.ranks // order.gpus_per_node)
    yield check_interface(net, hosts, environ)
    ports = infiniband_ports()
    if ports:
        yield check_infiniband(ports, environ)
        yield check_locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])


def look(master: str = "") -> Network:
    """This host's. `master`: host name or address of rank 0."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    # Without a master, an address of documentation, to which a way leads wherever one leads out.
    way = interface_of(outward(master or "192.0.2.1"))
    return Network(host=host, address=address, interfaces=interfaces(), outward=way)


def check_interface(net: Network, hosts: int, environ: Mapping[str, str]) -> Check:
    """The interface that gloo and NCCL will take can be reached from the other hosts.

    Ranks that meet set what is not exported, see megagpt.cluster.interface.
    """
    gloo, nccl = (environ.get(f"{name}_SOCKET_IFNAME", "") for name in ("GLOO", "NCCL"))
    unknown = ""
    if gloo and not all(name in net.interfaces for name in gloo.split(",")):
        unknown = f"GLOO_SOCKET_IFNAME = {gloo!r}"
    elif nccl and not _nccl_finds(nccl, net.interfaces):
        unknown = f"NCCL_SOCKET_IFNAME = {nccl!r}"
    if unknown:
        remedy = f"set it to one of {', '.join(net.interfaces)}"
        return Check("interface", FAIL, f"{unknown}: no such interface with an address", remedy)
    if gloo:
        return Check("interface", OK, f"{gloo} ({net.interfaces[gloo.split(',')[0]]})")
    if not net.address:
        trap = f"the host's own name {net.host} resolves to no address"
    elif net.address.startswith("127."):
        trap = f"the host's own name {net.host} resolves to {net.address}, itself"
    else:
        return Check("interface", OK, f"{net.outward or net.address} ({net.host} is {net.address})")
    if hosts == 1:
        return Check("interface", OK, f"{trap}: well on one host")
    if all(at.startswith("127.") for at in net.interfaces.values()):
        detail = "no interface but loopback has an address"
        return Check("interface", FAIL, detail, "connect this host to the network of the others")
    return Check("interface", OK, f"{trap}; ranks take the interface of their way to rank 0")


def _nccl_finds(chosen: str, interfaces: Mapping[str, str]) -> bool:
    """NCCL's rule: prefixes, `=` in front for whole names, `^` in front for all but these."""
    exact, others = "=" in chosen[:2], "^" in chosen[:2]
    wanted = tuple(chosen.lstrip("^=").split(","))
    named = [name in wanted if exact else name.startswith(wanted) for name in interfaces]
    return not all(named) if others else any(named)


def infiniband_ports(root: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """Port -> state, such as `mlx5_0/1` -> `ACTIVE`; empty without InfiniBand."""
    return {
        f"{path.parents[2].name}/{path.parent.name}": path.read_text().split(":")[-1].strip()
        for path in sorted(root.glob("*/ports/*/state"))
    }


def check_infiniband(ports: Mapping[str, str], environ: Mapping[str, str]) -> Check:
    """Every port is up, and NCCL may use them."""
    down = [name for name, state in ports.items() if state != "ACTIVE"]
    if down:
        detail = f"{', '.join(down)} not active, of {len(ports)} ports"
        return Check("InfiniBand", WARN, detail, "check the cables and the subnet manager")
    if environ.get("NCCL_IB_DISABLE", "0") != "0":
        detail = f"{len(ports)} active ports, but NCCL_IB_DISABLE is set"
        return Check("InfiniBand", WARN, detail, "unset NCCL_IB_DISABLE")
    return Check("InfiniBand", OK, f"{len(ports)} active ports")


def check_locked(limit: int) -> Check:
    """Memory that InfiniBand may lock, in bytes."""
    if 0 <= limit < LOCKED:
        detail = f"ulimit -l is {limit // 1024} KiB, and InfiniBand locks its buffers"
        remedy = (
            "ulimit -l unlimited, memlock in /etc/security/limits.conf, or "
            "LimitMEMLOCK=infinity for slurmd"
        )
        return Check("locked memory", FAIL, detail, remedy)
    return Check("locked memory", OK, "unlimited" if limit < 0 else f"{limit:,}")

"""By which interface do the ranks of several hosts reach each other? (stdlib only)"""

import fcntl
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.check.doctor.check import FAIL, OK, WARN, Check

_SIOCGIFADDR = 0x8915
"""Linux: the IPv4 address of an interface."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """A host's names and addresses."""

    host: str
    address: str
    """What the host's own name resolves to; empty: it does not."""
    interfaces: Mapping[str, str]
    """Name -> IPv4 address, loopback included."""
    outward: str = ""
    """The interface by which this host reaches rank 0; empty: not known."""


def look(master: str = "") -> Network:
    """This host's. `master`: host name or address of rank 0."""
    host = socket.gethostname()
    try:
        address = socket.gethostbyname(host)
    except OSError:
        address = ""
    interfaces = _interfaces()
    own = _own_address(master)
    outward = next((name for name, at in interfaces.items() if at == own), "")
    return Network(host=host, address=address, interfaces=interfaces, outward=outward)


def _interfaces() -> dict[str, str]:
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
            except OSError:
                continue  # down, or without an IPv4 address
            found[name] = socket.inet_ntoa(answer[20:24])
    return found


def _own_address(master: str) -> str:
    """The address from which a packet to `master`, or to the world, would leave; sends none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        try:
            asking.connect((master or "192.0.2.1", 9))
        except OSError:
            return ""
        return str(asking.getsockname()[0])


def check_interface(net: Network, hosts: int, environ: Mapping[str, str], has_gpus: bool) -> Check:
    """The interface that gloo and NCCL will take can be reached from the other hosts.

    gloo without GLOO_SOCKET_IFNAME listens where the host's own name resolves to, which Debian
    sets to 127.0.1.1: every other host then connects to itself. NCCL leaves loopback out.
    """
    problem = _no_such_interface(net, environ)
    if problem:
        return problem
    chosen = environ.get("GLOO_SOCKET_IFNAME", "")
    if chosen:
        return Check("interface", OK, f"{chosen} ({net.interfaces[chosen.split(',')[0]]})")
    outward = net.outward if not _is_loopback(net.interfaces.get(net.outward, "127.")) else ""
    remedy = (
        f"export GLOO_SOCKET_IFNAME={outward or 'eth0'} on every host (with pdsh: a line in "
        ".deepspeed_env), or give the name its real address in /etc/hosts"
    )
    if not net.address:
        trap = f"the host's own name {net.host} resolves to no address"
    elif _is_loopback(net.address):
        trap = f"the host's own name {net.host} resolves to {net.address}, itself"
    else:
        return Check("interface", OK, f"{outward or net.address} ({net.host} is {net.address})")
    if hosts > 1:
        return Check("interface", WARN if has_gpus else FAIL, trap, remedy)
    return Check("interface", OK, f"{trap}: well on one host, not between several")


def _no_such_interface(net: Network, environ: Mapping[str, str]) -> Check | None:
    """A variable that names an interface which is not there."""
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        chosen = environ.get(variable, "")
        if not chosen:
            continue
        if variable.startswith("NCCL"):
            there = _nccl_finds(chosen, net.interfaces)
        else:
            there = all(name in net.interfaces for name in chosen.split(","))
        if not there:
            return Check(
                "interface",
                FAIL,
                f"{variable} = {chosen!r}: no such interface with an address",
                f"set it to one of {', '.join(net.interfaces)}",
            )
    return None


def _nccl_finds(chosen: str, interfaces: Mapping[str, str]) -> bool:
    """NCCL's rule: prefixes, `=` in front for whole names, `^` in front for all but these."""
    exact, others = "=" in chosen[:2], "^" in chosen[:2]
    wanted = chosen.lstrip("^=").split(",")

    def named(name: str) -> bool:
        return any(name == one if exact else name.startswith(one) for one in wanted)

    return any(named(name) != others for name in interfaces)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.")


def infiniband_ports(root: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """Port -> state, such as `mlx5_0/1` -> `ACTIVE`; empty without InfiniBand."""
    found = {}
    for path in sorted(root.glob("*/ports/*/state")):
        name = f"{path.parents[2].name}/{path.parent.name}"
        found[name] = path.read_text().split(":")[-1].strip()
    return found


def check_infiniband(ports: Mapping[str, str], environ: Mapping[str, str]) -> Check:
    """Every port is up, and NCCL may use them."""
    down = [name for name, state in ports.items() if state != "ACTIVE"]
    if down:
        detail = f"{_list(down)} not active, of {len(ports)} ports"
        return Check("InfiniBand", WARN, detail, "check the cables and the subnet manager")
    if environ.get("NCCL_IB_DISABLE", "0") != "0":
        detail = f"{len(ports)} active ports, but NCCL_IB_DISABLE is set"
        return Check("InfiniBand", WARN, detail, "unset NCCL_IB_DISABLE")
    return Check("InfiniBand", OK, f"{len(ports)} active ports")


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)

"""Each rank takes the interface by which it reaches the others."""

import socket

import psutil
import pytest

from megagpt.cluster.interface import CHOICES, choose_interface, interface_of, outward


@pytest.fixture
def host(monkeypatch):
    """A host with two networks; `ways` has its address on the way to each other host."""
    ways = {"a-ib": "10.1.0.5", "10.1.0.6": "10.1.0.5", "b": "10.0.0.5"}

    class Way(socket.socket):
        """A socket that sends nothing and is bound to the address of a way."""

        def connect(self, address):
            if address[0] not in ways:
                raise OSError("no way")
            self.own = ways[address[0]], 40000

        def getsockname(self):
            return self.own

    monkeypatch.setattr(socket, "socket", Way)
    there = {"lo": "127.0.0.1", "eth0": "10.0.0.5", "ib0": "10.1.0.5"}
    here = [a for group in psutil.net_if_addrs().values() for a in group]
    card = next(a for a in here if a.family == socket.AF_INET)
    cards = {name: [card._replace(address=address)] for name, address in there.items()}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)


@pytest.mark.parametrize(
    ("rank", "addresses", "expected"),
    [
        # By the way to rank 0; on its own host by the way to another.
        (2, ["127.0.1.1", "127.0.1.1", "10.1.0.6"], "ib0"),
        (0, ["127.0.1.1", "127.0.1.1", "10.1.0.6"], "ib0"),
        (1, ["127.0.1.1", "127.0.1.1", "10.1.0.6"], "ib0"),
        (1, ["127.0.1.1", "127.0.1.1", ""], None),
    ],
)
def test_the_way_decides(host, rank, addresses, expected):
    environ = {}
    choose_interface(rank, ["a", "a", "b"], addresses, "a-ib", environ)
    assert environ == (dict.fromkeys(CHOICES, expected) if expected else {})


def test_what_was_exported_stays(host):
    environ = {"GLOO_SOCKET_IFNAME": "eth0"}
    choose_interface(2, ["a", "a", "b"], ["", "", "10.1.0.6"], "a-ib", environ)
    assert environ == {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "ib0"}


def test_on_one_host_nothing_is_set():
    environ = {}
    choose_interface(0, ["a", "a"], ["10.0.0.5"] * 2, "a", environ)
    assert environ == {}


def test_ways_of_this_host():
    assert outward("127.0.0.1") == "127.0.0.1" and outward("no.such.host.invalid") == ""
    assert interface_of("127.0.0.1") == "" and interface_of("") == ""

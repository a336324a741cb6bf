"""Ranks that meet: who is missing and what differs is said once, by real processes."""

import json
import os
import subprocess
import sys

import pytest

from megagpt.cluster import process as group
from megagpt.cluster.agreement import DRIVER
from megagpt.cluster.meeting import Meeting
from megagpt.cluster.ranks import Ranks
from megagpt.errors import MegagptError
from tests.lib.distributed import environment, free_port

MEET = """
import json, os, sys, time
from megagpt.cluster import process as group
from megagpt.cluster.ranks import Ranks
from megagpt.errors import MegagptError
rank, world, minutes = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
said = ""
try:
    group.meet(Ranks(rank=rank, world=world), json.loads(sys.argv[4]), minutes)
    code = 0
except MegagptError as error:
    code, said = error.exit_code, str(error) if group.first_to_fail() else "(said by another)"
group.leave(clean=False, wait_s=2)
print(json.dumps([code, said]))
"""


def meet(ranks, world, minutes=1.0, facts=None, **more):
    """What each of these ranks of `world` ended with: [exit code, message]."""
    environ = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} | more
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MEET, str(rank), str(world), str(minutes)]
            + [json.dumps((facts or {}).get(rank, {}))],
            env=environ | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in ranks
    ]
    return [json.loads(process.communicate(timeout=90)[0]) for process in processes]


def test_ranks_that_differ_say_it_once():
    ends = meet([0, 1], 2, facts={0: {"code": "a"}, 1: {"code": "b"}})
    host = os.uname().nodename
    assert [code for code, _ in ends] == [2, 2]
    assert sorted(said for _, said in ends) == [
        "(said by another)",
        f"code is not the same on all hosts: a on {host}; b on {host}",
    ]


def test_hosts_of_two_drivers_meet_all_the_same():
    ends = meet([0, 1], 2, facts={0: {DRIVER: "NVIDIA 1"}, 1: {DRIVER: "NVIDIA 2"}})
    assert ends == [[0, ""], [0, ""]]


def test_a_rank_that_does_not_come_is_named():
    ends = meet([0, 2], 4, minutes=0.15)
    assert [code for code, _ in ends] == [1, 1]
    (said,) = [said for _, said in ends if said != "(said by another)"]
    host = os.uname().nodename
    assert said.startswith("ranks 1, 3 of 4 did not come within 0.15 minutes; the others run on ")
    assert f"run on {host}: look at what the launcher says" in said


def test_rank_0_that_does_not_come():
    ((code, said),) = meet([1], 2, minutes=0.02)
    assert code == 1
    assert said.startswith(f"rank 1 on {os.uname().nodename}: rank 0 did not answer at 127.0.0.1:")


def test_a_port_that_is_taken():
    import socket

    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ((code, said),) = meet([0], 2, MASTER_PORT=port)
    assert code == 1
    assert said.startswith(f"MASTER_PORT = {port}: rank 0 cannot listen there on ")


def test_ranks_of_another_run_at_the_same_port_are_not_met():
    """The store of a run whose rank 0 waits; a rank of another run that is led to it."""
    environ = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    named = MEET.replace("minutes)", "minutes, sys.argv[5])")
    ends = [
        subprocess.Popen(
            [sys.executable, "-c", named, str(rank), "2", "0.1", "{}", run],
            env=environ | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, run in enumerate(("runs/a", "runs/b"))
    ]
    said = [json.loads(process.communicate(timeout=90)[0])[1] for process in ends]
    assert said[0].startswith("rank 1 of 2 did not come within 0.1 minutes")
    port = environ["MASTER_PORT"]
    assert said[1] == (
        f"MASTER_PORT = {port}: the run 'runs/a' meets there, not 'runs/b'; choose another port"
    )


WORK = """
import sys, time
from pathlib import Path
from megagpt.cluster import meeting, process as group
from megagpt.cluster.ranks import Ranks
meeting.TELL_S = meeting.POLL_S = 0.1
rank = int(sys.argv[1])
group.meet(Ranks(rank=rank, world=2), {}, 1.0)
signs = []
for turn in range(2):
    work = group.long_work(lambda: signs.append(time.monotonic()))
    until = time.monotonic() + (rank == turn) * 2
    while time.monotonic() < until:
        time.sleep(0.05)
        work.alive()
    work.wait()
assert len(signs) > 20 and max(b - a for a, b in zip(signs, signs[1:])) < 1.5, signs
group.leave(clean=False, wait_s=2)
"""


def test_ranks_that_wait_for_long_work_know_that_it_goes_on():
    environ = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = [sys.executable, "-c", WORK]
    processes = [subprocess.Popen([*line, str(rank)], env=environ) for rank in range(2)]
    assert [process.wait(timeout=90) for process in processes] == [0, 0]


SHARE = """
import socket, sys
from pathlib import Path
from megagpt.cluster import process as group
from megagpt.cluster.ranks import Ranks
from megagpt.errors import UsageError
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
socket.gethostname = lambda: f"host-{rank}"
group.meet(Ranks(rank=rank, world=2), {}, 1.0)
try:
    group._meetings[-1].share_folder(folder, wait_s=1.0)
    print("shared", end="")
except UsageError as error:
    print(error, end="")
group.leave(clean=False, wait_s=2)
"""


@pytest.mark.parametrize("shared", [True, False])
def test_a_run_folder_that_hosts_do_not_share_is_told_as_they_meet(tmp_path, shared):
    environ = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    folders = [tmp_path / "a", tmp_path / ("a" if shared else "b")]
    for folder in folders:
        folder.mkdir(exist_ok=True)
    line = [sys.executable, "-c", SHARE]
    processes = [
        subprocess.Popen(
            [*line, str(rank), str(folder)], env=environ, stdout=subprocess.PIPE, text=True
        )
        for rank, folder in enumerate(folders)
    ]
    said = [process.communicate(timeout=90)[0] for process in processes]
    assert not list((tmp_path / "a").iterdir())
    if shared:
        assert said == ["shared", "shared"]
    else:
        assert said[0].startswith(f"output = '{tmp_path}/a': what rank 0 on host-0 has written")
        assert said[1].startswith(f"output = '{tmp_path}/b': what rank 0 on host-0 has written")
        assert "is not seen on host-1 (No such file or directory); all hosts must share" in said[0]


def test_what_is_never_said_is_not_waited_for_in_silence(monkeypatch):
    monkeypatch.setattr(group, "_meetings", [])
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    meeting = group.meet(Ranks(), {}, 0.1)
    assert meeting.hosts == [os.uname().nodename]
    meeting.put("word", [1, "a"])
    assert meeting.has("word") and meeting.get("word") == [1, "a"]
    with pytest.raises(MegagptError, match="rank 0 on .* waited for news: "):
        meeting.get("news", wait_s=0.1)


def test_a_store_that_another_keeps_and_one_that_is_gone(monkeypatch):
    """The store of a program that is no run of ours; then it ends."""
    from torch.distributed import TCPStore

    port = free_port()
    store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    told = f"rank 1: rank 0 did not come to 127.0.0.1:{port} within 0.01 minutes"
    with pytest.raises(MegagptError, match=told):
        Meeting(Ranks(rank=1, world=2), 0.01)
    store.set("megagpt meets", "")
    meeting = Meeting(Ranks(rank=1, world=2), 0.1)
    assert meeting.count("work", 2) == 2 and meeting.begin_work() != meeting.begin_work()
    del store
    with pytest.raises(MegagptError, match="rank 1: rank 0 has ended"):
        meeting.count("work")

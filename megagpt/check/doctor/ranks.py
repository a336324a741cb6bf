"""The examination of all hosts by the ranks that a launcher started on them.

The first rank of each host examines it; rank 0 compares the reports. The all-reduce comes last,
watched from outside, so that one that hangs does not take the table with it.
"""

import contextlib
import dataclasses
import os
import socket
import threading
import time
from typing import Any

from megagpt.check.doctor import bandwidth
from megagpt.check.doctor.check import (
    FAIL,
    Check,
    as_text,
    as_tree,
    failed,
    from_tree,
    merged,
    names,
)
from megagpt.check.doctor.compare import check_clocks, check_same
from megagpt.check.doctor.examine import Order, examine, load
from megagpt.check.doctor.host import Place
from megagpt.check.doctor.meeting import Meeting
from megagpt.check.doctor.shared import folder_of, nonce
from megagpt.cluster.meeting import join, leave
from megagpt.cluster.ranks import Ranks, prepare_environment
from megagpt.errors import EXIT_OK, EXIT_USAGE, MegagptError

EXAMINATION_S = 24 * 3600.0
"""Reading every byte of the shards may take hours; a host that dies is the launcher's to notice."""
LAST_S = 15.0
"""Seconds that the others leave rank 0 to speak."""
GRACE_S = 3.0
"""Seconds in which the others may fail where one has failed."""
POLL_S = 0.1


def examine_together(order: Order, ranks: Ranks, wait_s: float) -> int:
    """This rank's part; returns the exit code, the same on every rank. Rank 0 prints the table.

    wait_s: seconds for the ranks to meet, and for the all-reduce. Raises MegagptError when ranks
    do not come.
    """
    prepare_environment(ranks, os.environ)
    meeting = Meeting(ranks, wait_s)
    hosts = meeting.gather("host", socket.gethostname())
    checks = _examine_hosts(order, ranks, meeting, hosts)
    return _sum_up(ranks, meeting, hosts, checks)


def _examine_hosts(order: Order, ranks: Ranks, meeting: Meeting, hosts: list[str]) -> list[Check]:
    """On rank 0 what was found on all hosts; empty on the others."""
    leaders = {hosts.index(host): host for host in dict.fromkeys(hosts)}
    own = socket.gethostname()
    place = Place(
        hosts=len(leaders),
        ranks=ranks.world,
        ranks_here=hosts.count(own),
        master=os.environ["MASTER_ADDR"],
    )
    first = ranks.rank == 0
    shared = nonce(folder_of(load(order))) if first else contextlib.nullcontext(("", ""))
    with shared as written:
        path, content = meeting.from_first("shared file", written)
        if ranks.rank in leaders:
            report = examine(order, dataclasses.replace(place, nonce=(path, content)))
            meeting.put(f"report of rank {ranks.rank}", as_tree(report))
        checks = _compare(meeting, leaders) if first else []
    if ranks.rank in leaders and not first:
        meeting.tell_time(EXAMINATION_S)
    # The all-reduce would otherwise wait for the slowest host.
    meeting.from_first("examined", None, EXAMINATION_S)
    return checks


def _compare(meeting: Meeting, leaders: dict[int, str]) -> list[Check]:
    """On rank 0 the checks of all hosts, and between them."""
    trees = (meeting.get(f"report of rank {rank}", EXAMINATION_S) for rank in leaders)
    reports = [from_tree(tree) for tree in trees]
    checks = merged(reports)
    others = {rank: host for rank, host in leaders.items() if rank}
    if others:
        checks += [*check_same(reports), check_clocks(list(meeting.clocks(others)))]
    return checks


def _sum_up(ranks: Ranks, meeting: Meeting, hosts: list[str], checks: list[Check]) -> int:
    """The all-reduce, the table and the exit code."""
    results: list[dict[str, Any]] = []
    # In a thread of its own, because nothing else ends a group that waits for a rank.
    reducing = threading.Thread(target=lambda: results.append(_all_reduce(ranks)), daemon=True)
    reducing.start()
    until = time.monotonic() + meeting.wait_s
    if ranks.rank == 0:
        told = _collect(meeting, ranks.world, results, until)
        checks = [*checks, *_judge(told, hosts)]
        print(as_text(checks), flush=True)
        code = EXIT_USAGE if failed(checks) else EXIT_OK
        meeting.put("exit code", code)
    else:
        code = _told_code(meeting, ranks, results, until + LAST_S)
    if reducing.is_alive():
        # Rank 0 keeps the store: the others look there for the code first.
        time.sleep(POLL_S * (10 if ranks.rank == 0 else 0))
        os._exit(code)
    leave(clean="error" not in results[0])
    return code


def _all_reduce(ranks: Ranks) -> dict[str, Any]:
    """What this rank measured, or the error that it met."""
    try:
        join(ranks)
        return bandwidth.measure(ranks.rank, ranks.world)
    except Exception as error:  # whatever it is, the table tells it
        return {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}


def _collect(
    meeting: Meeting, world: int, own: list[dict[str, Any]], until: float
) -> list[dict[str, Any] | None]:
    """On rank 0 what every rank says, by rank; None for those that had not ended in time."""
    told: list[dict[str, Any] | None] = [None] * world
    while None in told and time.monotonic() < until:
        time.sleep(POLL_S)
        told[0] = own[0] if own else None
        for rank in range(1, world):
            key = f"result of rank {rank}"
            if told[rank] is None and meeting.there(key):
                told[rank] = meeting.get(key)
        if any(one and "error" in one for one in told):
            # Where one has failed the others wait for it in vain, or fail in a moment.
            until = min(until, time.monotonic() + GRACE_S)
    return told


def _told_code(meeting: Meeting, ranks: Ranks, own: list[dict[str, Any]], until: float) -> int:
    """On the other ranks: tells rank 0 the result, and is told the exit code."""
    told = False
    try:
        while not meeting.there("exit code") and time.monotonic() < until:
            time.sleep(POLL_S)
            if own and not told:
                meeting.put(f"result of rank {ranks.rank}", own[0])
                told = True
        return int(meeting.get("exit code", POLL_S))
    except (RuntimeError, MegagptError):
        # Rank 0 has ended, and has said why.
        return EXIT_USAGE


def _judge(results: list[dict[str, Any] | None], hosts: list[str]) -> list[Check]:
    measured = [one for one in results if one and "error" not in one]
    if len(measured) < len(results):
        return [_broken(results)]
    slowest = max(one["seconds"] for one in measured)
    speeds = [one["flops"] for one in measured]
    gpus = all(speeds)
    found = [bandwidth.check_all_reduce(slowest, measured[0]["bytes"], len(hosts), gpus)]
    return [*found, bandwidth.check_speeds(speeds, hosts)] if gpus else found


def _broken(results: list[dict[str, Any] | None]) -> Check:
    """The all-reduce did not work: which ranks say what."""
    errors: dict[str, list[str]] = {}
    for rank, result in enumerate(results):
        why = "waited for the others in vain" if result is None else result.get("error")
        if why:
            errors.setdefault(why, []).append(str(rank))
    detail = "\n".join(f"rank {names(ranks)}: {why}" for why, ranks in errors.items())
    return Check(
        "all-reduce",
        FAIL,
        detail,
        "see the interface above; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network "
        "that the hosts share; open the firewall between them; NCCL_DEBUG=INFO says more",
    )

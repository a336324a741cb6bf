"""The doctor on the ranks that a launcher started on all hosts.

The first rank of each host examines it; rank 0 compares the reports. They travel through the store
at which the ranks met, so they come through where gloo or NCCL will fail. The all-reduce comes
last, watched from outside, so that one that hangs does not take the table with it.
"""

import contextlib
import dataclasses
import os
import threading
import time
from typing import Any

from megagpt.check import bandwidth
from megagpt.check.examine import examine, shared_file
from megagpt.check.findings import (
    FAIL,
    Check,
    Order,
    as_text,
    check_clocks,
    check_same,
    failed,
    merged,
    names,
    report_of,
)
from megagpt.cluster.meeting import Meeting
from megagpt.cluster.process import join, leave, meet, prepare_environment
from megagpt.cluster.ranks import Ranks
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
    meeting = meet(ranks, {}, wait_s / 60)
    # 1) Every host by its first rank.
    checks = _examine_hosts(order, meeting, wait_s)
    # 2) The network between them, in a thread of its own, because nothing else ends a group that
    # waits for a rank.
    reducing = threading.Thread(target=_all_reduce, args=[meeting], daemon=True)
    reducing.start()
    # 3) The table and the exit code.
    until = time.monotonic() + wait_s
    if ranks.rank == 0:
        checks += _judge(_collect(meeting, until), meeting.hosts)
        print(as_text(checks), flush=True)
        code = EXIT_USAGE if failed(checks) else EXIT_OK
        meeting.put("exit code", code)
    else:
        code = _exit_code(meeting, until + LAST_S)
    if reducing.is_alive():
        # Rank 0 keeps the store: the others look there for the code first.
        time.sleep(POLL_S * (10 if ranks.rank == 0 else 0))
        os._exit(code)
    leave(clean="error" not in meeting.get(f"result of rank {ranks.rank}"))
    return code


def _examine_hosts(order: Order, meeting: Meeting, wait_s: float) -> list[Check]:
    """On rank 0 what was found on all hosts, and between them; empty on the others."""
    rank, hosts = meeting.ranks.rank, meeting.hosts
    leaders = [hosts.index(host) for host in dict.fromkeys(hosts)]
    order = dataclasses.replace(
        order,
        hosts=len(leaders),
        ranks=len(hosts),
        ranks_here=hosts.count(hosts[rank]),
        master=os.environ["MASTER_ADDR"],
    )
    checks = []
    with shared_file(order) if rank == 0 else contextlib.nullcontext(("", "")) as written:
        if rank == 0:
            meeting.put("shared file", written)
        if rank in leaders:
            # All leaders go on from here at once, which their clocks are compared by.
            seen = meeting.get("shared file", wait_s)
            report = examine(dataclasses.replace(order, shared_file=seen))
            meeting.put(f"report of rank {rank}", dataclasses.asdict(report))
        if rank == 0:
            trees = (meeting.get(f"report of rank {leader}", EXAMINATION_S) for leader in leaders)
            reports = [report_of(tree) for tree in trees]
            checks = merged(reports)
            if len(reports) > 1:
                ahead_s = {report.host: report.began - reports[0].began for report in reports}
                checks += [*check_same(reports), check_clocks(ahead_s, "rank 0")]
            meeting.put("examined", "")
    # The all-reduce would otherwise wait for the slowest host.
    meeting.get("examined", EXAMINATION_S)
    return checks


# --- the all-reduce -----------------------------------------------------------------------------


def _all_reduce(meeting: Meeting) -> None:
    """Tells what this rank measured, or the error that it met."""
    ranks = meeting.ranks
    try:
        join(ranks)
        result: dict[str, Any] = bandwidth.measure(ranks.rank, ranks.world)
    except Exception as error:  # whatever it is, the table tells it
        result = {"error": (str(error).strip() or type(error).__name__).splitlines()[0]}
    meeting.put(f"result of rank {ranks.rank}", result)


def _collect(meeting: Meeting, until: float) -> dict[int, dict[str, Any]]:
    """On rank 0 what the ranks say that have ended in time, by rank."""
    results: dict[int, dict[str, Any]] = {}
    while len(results) < meeting.ranks.world and time.monotonic() < until:
        # Not by a wait of the store, which would keep the thread from telling its result.
        time.sleep(POLL_S)
        for rank in range(meeting.ranks.world):
            if rank not in results and meeting.has(f"result of rank {rank}"):
                results[rank] = meeting.get(f"result of rank {rank}")
        if any("error" in result for result in results.values()):
            # Where one has failed the others wait for it in vain, or fail in a moment.
            until = min(until, time.monotonic() + GRACE_S)
    return results


def _exit_code(meeting: Meeting, until: float) -> int:
    """The exit code, as rank 0 tells the others."""
    try:
        while not meeting.has("exit code") and time.monotonic() < until:
            time.sleep(POLL_S)
        return int(meeting.get("exit code", POLL_S))
    except (RuntimeError, MegagptError):
        # Rank 0 has ended, and has said why.
        return EXIT_USAGE


def _judge(results: dict[int, dict[str, Any]], hosts: list[str]) -> list[Check]:
    """The checks of the all-reduce: how fast, or which ranks say what where it did not work."""
    errors: dict[str, list[str]] = {}
    for rank in range(len(hosts)):
        result = results.get(rank, {"error": "waited for the others in vain"})
        if "error" in result:
            errors.setdefault(result["error"], []).append(str(rank))
    if errors:
        detail = "\n".join(f"rank {names(ranks)}: {why}" for why, ranks in errors.items())
        remedy = (
            "see the interface above; set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to the network "
            "that the hosts share; open the firewall between them; NCCL_DEBUG=INFO says more"
        )
        return [Check("all-reduce", FAIL, detail, remedy)]
    slowest = max(result["seconds"] for result in results.values())
    speeds = [results[rank]["flops"] for rank in range(len(hosts))]
    gpus = all(speeds)
    check = bandwidth.check_all_reduce(slowest, results[0]["bytes"], len(hosts), gpus)
    return [check, bandwidth.check_speeds(speeds, hosts)] if gpus else [check]

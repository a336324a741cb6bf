"""The ranks meet, agree that they train the same run, and leave together (L2).

They first meet at a key-value store that rank 0 keeps at MASTER_ADDR:MASTER_PORT. No collective is
needed there, so a rank that never comes is named instead of waited for without a word.
"""

import json
import logging
import os
import signal
import socket
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megagpt.cluster.agreement import disagreements, facts
from megagpt.cluster.ranks import Ranks
from megagpt.config import RunConfig
from megagpt.engine.malloc import keep_freed_memory
from megagpt.errors import EXIT_FAILURE, EXIT_USAGE, MegagptError, UsageError

MEETING_MINUTES = 10.0
"""How long ranks wait for each other; less where log.watchdog_minutes is less."""
GROUP_MINUTES = 30.0
"""Longest collective of the group; a hung step is the watchdog's."""
_meetings: list[tuple[Any, Ranks]] = []
"""The store of this process and its place, once it has met the others."""


def join(ranks: Ranks, config: RunConfig | None = None) -> None:
    """Joins the process group of all ranks: nccl on GPUs, gloo on CPUs; every rank must call it.

    With a configuration the hosts compare what must be the same on all of them, see
    megagpt.cluster.agreement. Raises UsageError that names what differs; MegagptError that names
    ranks which did not come within MEETING_MINUTES, and when the launcher died before.
    """
    if ranks.launcher in ("deepspeed", "torchrun") and _adopted(os.getppid()):
        raise MegagptError(
            f"rank {ranks.rank}: the launcher died while this rank started; run the command again"
        )
    import torch

    minutes, own = MEETING_MINUTES, {}
    if config is not None:
        # So a rank that is missing is named before the watchdog ends the start.
        minutes = min(minutes, config.log.watchdog_minutes or minutes)
        # What ranks of one host read is the same.
        own = facts(config) if ranks.local_rank == 0 and ranks.local_world < ranks.world else {}
    meet(ranks, own, minutes, config.output if config else "")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        keep_freed_memory()
    import deepspeed
    from deepspeed.utils import logger

    # Its news of memory and settings would bury the run's own lines; its warnings stay.
    logger.setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")

    # An extension for inference alone, which DeepSpeed would compile for a minute on CPUs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    deepspeed.init_distributed(
        dist_backend="nccl" if torch.cuda.is_available() else "gloo",
        auto_mpi_discovery=False,
        timeout=timedelta(minutes=GROUP_MINUTES),
        rank=ranks.rank,
        world_size=ranks.world,
    )


# --- the meeting --------------------------------------------------------------------------------


def meet(ranks: Ranks, facts: Mapping[str, str], minutes: float, run: str = "") -> Any:
    """Returns the store when all ranks are there and agree. Raises what join does.

    run: the run's name. Where another run holds the port, the ranks that are led to its store must
    not be taken for its own.
    """
    from torch.distributed import PrefixStore

    store = PrefixStore(f"megagpt/{run}", _store(ranks, minutes))
    _meetings.append((store, ranks))
    store.set(f"here/{ranks.rank}", json.dumps([socket.gethostname(), dict(facts)]))
    if ranks.rank == 0:
        store.set("verdict", json.dumps(_verdict(store, ranks.world, minutes)))
    try:
        # Rank 0 may have come just in time to wait `minutes` itself.
        store.wait(["verdict"], timedelta(minutes=2 * minutes))
        code, problem = json.loads(store.get("verdict"))
    except RuntimeError:
        code, problem = EXIT_FAILURE, f"rank {ranks.rank}: rank 0 ended before all ranks had come"
    if problem:
        raise UsageError(problem) if code == EXIT_USAGE else MegagptError(problem)
    return store


def _store(ranks: Ranks, minutes: float) -> Any:
    """The store, kept by rank 0, or by torchrun's own process on that host."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keeps = ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        # multi_tenant: torch takes the same store for the process group.
        return TCPStore(
            address,
            port,
            is_master=keeps,
            timeout=timedelta(minutes=minutes),
            wait_for_workers=False,
            multi_tenant=keeps,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if keeps:
            raise MegagptError(
                f"MASTER_PORT = {port}: rank 0 cannot listen there on {socket.gethostname()}; "
                f"another run may hold the port, so choose another ({reason})"
            ) from None
        raise MegagptError(
            f"rank {ranks.rank} on {socket.gethostname()}: rank 0 did not answer at "
            f"{address}:{port} within {minutes:g} minutes; see that MASTER_ADDR is a name of its "
            f"host that every host can reach, and whether it has started ({reason})"
        ) from None


def _verdict(store: Any, world: int, minutes: float) -> tuple[int, str]:
    """(exit code, problem) after all ranks have come or not; (0, "") when they agree."""
    names = [f"here/{rank}" for rank in range(world)]
    try:
        store.wait(names, timedelta(minutes=minutes))
    except RuntimeError:
        there = [store.check([name]) for name in names]
        hosts = [json.loads(store.get(name))[0] for name in _where(names, there)]
        return EXIT_FAILURE, (
            f"{_spans([r for r in range(world) if not there[r]])} of {world} did not come within "
            f"{minutes:g} minutes; the others run on {', '.join(dict.fromkeys(hosts))}: look at "
            "what the launcher says of the missing host, and try to reach it by ssh"
        )
    said = [json.loads(store.get(name)) for name in names]
    problems = disagreements([host for host, _ in said], [facts for _, facts in said])
    return (EXIT_USAGE, "\n".join(problems)) if problems else (0, "")


def _where(names: Sequence[str], chosen: Sequence[bool]) -> list[str]:
    return [name for name, take in zip(names, chosen, strict=True) if take]


def _spans(numbers: Sequence[int]) -> str:
    """rank 3, or ranks 1-2, 5: ascending numbers, neighbours drawn together."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    told = ", ".join(f"{a}-{b}" if a < b else str(a) for a, b in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {told}"


def _adopted(parent: int) -> bool:
    """Whether the process `parent` takes in what other processes leave, and launches no ranks.

    In a container the launcher itself may be process 1.
    """
    try:
        words = Path(f"/proc/{parent}/cmdline").read_bytes().lower().split(b"\0")
    except OSError:
        return False
    program = os.path.basename(words[0].decode(errors="replace"))
    if program in _REAPERS:
        return True
    return parent == 1 and not any(b"python" in w or b"torchrun" in w for w in words[:3])


_REAPERS = ("init", "systemd", "tini", "dumb-init", "docker-init", "containerd-shim-runc-v2")
"""Programs that Linux hands orphans to."""


def first_to_fail(wait_s: float = 10.0) -> bool:
    """Whether this rank is the first to call this, so that one rank reports what may stop all.

    Before the ranks meet they all read the same files, and rank 0 reports. The others give it
    `wait_s` seconds, within which the launcher ends them: if they ended first, the launcher would
    end rank 0 before it has spoken. One that is still there met an error of its own.
    """
    if not _meetings:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(wait_s)
        return True
    try:
        return bool(_meetings[-1][0].add("failed", 1) == 1)
    except RuntimeError:
        # The rank that kept the store is gone; better said twice than never.
        return True


def leave(clean: bool = True, wait_s: float = 5.0) -> None:
    """Leaves the process group; without it a rank now and then aborts at exit.

    clean: all ranks come here. Otherwise perhaps only this one does, and the others wait for it
    in the middle of a step: they are given `wait_s` seconds to come, and the launcher ends them.
    """
    if not _meetings:
        return
    import torch.distributed as dist

    if clean:
        dist.barrier()
    else:
        # A launcher that sees the first rank end signals the others, which would lose their codes.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not _all_left(*_meetings[-1], wait_s):
            return
    if dist.is_initialized():
        dist.destroy_process_group()


def _all_left(store: Any, ranks: Ranks, wait_s: float) -> bool:
    """Whether every rank calls this within `wait_s` seconds."""
    try:
        store.set(f"left/{ranks.rank}", "")
        names = [f"left/{rank}" for rank in range(ranks.world)]
        store.wait(names, timedelta(seconds=wait_s))
    except RuntimeError:
        return False
    return True

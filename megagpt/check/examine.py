"""One host's report, for whoever asks: itself, rank 0, or a host that came by ssh."""

import contextlib
import os
import secrets
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from megagpt.check.findings import FAIL, GPUS, Check, Order, Report
from megagpt.check.machine import check_machine, check_versions, gpus, installed, pins
from megagpt.errors import UsageError


def examine(order: Order) -> Report:
    """Everything that this host can find out by itself. Raises nothing: problems are checks."""
    began, t0, host = time.time(), time.monotonic(), socket.gethostname()
    versions = check_versions(installed(), pins())
    if versions.status == FAIL:
        # The other checks would end at a package that is missing.
        return Report(host=host, checks=[versions], began=began, took_s=time.monotonic() - t0)
    from megagpt.check.network import check_network
    from megagpt.check.run_file import check_run
    from megagpt.cluster.agreement import facts_of_code, facts_of_devices, facts_of_run
    from megagpt.config import load_run

    cards = gpus()
    checks = [versions, *check_machine(order, cards)]
    checks += check_network(order, os.environ)
    facts = {GPUS: ", ".join(f"{card.name} {card.memory_mib} MiB" for card in cards) or "none"}
    try:
        config = load_run(order.run, order.overrides) if order.run else None
    except UsageError as error:
        config = None
        checks.append(Check("run file", FAIL, str(error)))
    if config:
        checks += check_run(config, order, cards)
    # check_run has said what is wrong with a DeepSpeed JSON that cannot be read.
    with contextlib.suppress(UsageError):
        facts |= facts_of_run(config) if config else facts_of_code() | facts_of_devices()
    return Report(host=host, checks=checks, facts=facts, began=began, took_s=time.monotonic() - t0)


@contextlib.contextmanager
def shared_file(order: Order) -> Iterator[tuple[str, str]]:
    """Writes a file nobody has seen before beside the run folder, or without a run in the current
    folder, and removes it; its path and content.

    Both empty for a folder that cannot be written to: the check of the disk names it.
    """
    from megagpt.config import load_run

    output = Path()
    with contextlib.suppress(UsageError):
        output = Path(load_run(order.run, order.overrides).output) if order.run else output
    path = existing(output) / f".megagpt-doctor-{secrets.token_hex(8)}"
    content = secrets.token_hex(16)
    try:
        path.write_text(content)
    except OSError:
        yield "", ""
        return
    try:
        yield str(path), content
    finally:
        path.unlink(missing_ok=True)


def existing(path: Path) -> Path:
    """The nearest folder above `path`, or itself, that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())

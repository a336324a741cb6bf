"""One host's report, for whoever asks: itself, rank 0, or a host that came by ssh."""

import os
import socket
from dataclasses import dataclass

from megagpt.check.doctor.check import FAIL, Check, Report
from megagpt.check.doctor.host import (
    Place,
    check_host,
    check_versions,
    gpus,
    installed,
    pins,
)
from megagpt.config import RunConfig, load_run
from megagpt.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """What is to be examined: the command line."""

    run: str = ""
    """Run file; empty: the machine alone."""
    overrides: tuple[str, ...] = ()
    full: bool = False
    """Read every byte of the shards."""


def examine(order: Order, place: Place) -> Report:
    """Everything that this host can find out by itself. Raises nothing: problems are checks."""
    host, versions = socket.gethostname(), check_versions(installed(), pins())
    if versions.status == FAIL:
        # The other checks would end at a package that is missing.
        return Report(host=host, checks=[versions])
    from megagpt.check.doctor.compare import GPUS

    cards = gpus()
    checks = [versions, *check_host(place, cards, os.environ)]
    config = load(order) if order.run else None
    if isinstance(config, str):
        checks.append(Check("run file", FAIL, config))
        config = None
    if config:
        from megagpt.check.doctor.inputs import check_run

        checks += check_run(config, place, cards, order.full)
    kinds = ", ".join(f"{card.name} {card.memory_mib} MiB" for card in cards) or "none"
    return Report(host=host, checks=checks, facts={GPUS: kinds} | _facts(config))


def _facts(config: RunConfig | None) -> dict[str, str]:
    """What must be the same on all hosts; nothing of a run whose DeepSpeed JSON cannot be read."""
    from megagpt.cluster.agreement import facts, facts_of_code

    try:
        return facts(config) if config else facts_of_code()
    except UsageError:
        return {}


def load(order: Order) -> RunConfig | str:
    """The run, or why there is none."""
    try:
        return load_run(order.run, order.overrides)
    except UsageError as error:
        return str(error)

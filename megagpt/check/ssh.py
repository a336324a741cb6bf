"""The doctor on every host of a hostfile by ssh, before anything is launched (stdlib only).

Each host runs the same examination and prints its report as JSON; here they are compared.
"""

import dataclasses
import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megagpt.check.examine import shared_file
from megagpt.check.findings import (
    FAIL,
    OK,
    Check,
    Order,
    Report,
    check_clocks,
    check_same,
    merged,
    report_of,
)
from megagpt.cluster.hostfile import read_hostfile

CONNECT_S = 10
"""Seconds for ssh to reach a host."""
AT_ONCE = 64
"""Connections at a time."""


def examine_by_ssh(order: Order, hostfile: Path) -> list[Check]:
    """The checks of all hosts of a hostfile. Raises UsageError for a hostfile that is none."""
    slots = read_hostfile(hostfile)
    master, ranks = next(iter(slots)).rpartition("@")[2], sum(slots.values())
    order = dataclasses.replace(order, hosts=len(slots), ranks=ranks, master=master)
    with shared_file(order) as written, ThreadPoolExecutor(AT_ONCE) as pool:
        orders = [
            dataclasses.replace(order, ranks_here=n, shared_file=written) for n in slots.values()
        ]
        visits = list(pool.map(visit, slots, orders))
    reports = [report for report, _ in visits]
    reached = [report for report in reports if report.began]
    checks = [Check("hostfile", OK, f"{hostfile}: {len(slots)} hosts, {ranks} ranks")]
    checks += merged(reports)
    if len(reached) > 1:
        checks += check_same(reached)
    ahead_s = {report.host: ahead for report, ahead in visits if report.began}
    return [*checks, check_clocks(ahead_s, "this host")]


def visit(host: str, order: Order) -> tuple[Report, float]:
    """(what one host found, seconds by which its clock is ahead); a host that is not reached has
    that as its only finding."""
    try:
        socket.getaddrinfo(host.rpartition("@")[2], None)
        # A host that is lost meanwhile would be waited for without an end.
        options = ("BatchMode=yes", f"ConnectTimeout={CONNECT_S}", "ServerAliveInterval=15")
        words = ["ssh", *(f"-o{option}" for option in options), host, command(order, os.environ)]
        done = subprocess.run(words, capture_output=True, text=True)
    except socket.gaierror as error:
        # ssh may know the name from its own configuration; the ranks will not.
        remedy = "correct the hostfile, or enter the host in DNS or /etc/hosts"
        return _unreached(host, str(error.args[-1]), remedy), 0.0
    except FileNotFoundError:
        return _unreached(host, "ssh is not installed here", "install an OpenSSH client"), 0.0
    received = time.time()
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        report = dataclasses.replace(report_of(json.loads(lines[-1])), host=host)
        # The host printed it as it ended: ssh is done a moment later.
        return report, report.began + report.took_s - received
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    remedy = f"install the same checkout and Python there: {sys.executable}, {Path.cwd()}"
    if done.returncode == 255:
        remedy = f"make `ssh {host} true` work without a password: sshd, keys, known_hosts"
    return _unreached(host, why, remedy), 0.0


def _unreached(host: str, why: str, remedy: str) -> Report:
    return Report(host=host, checks=[Check("reach", FAIL, why, remedy)])


def command(order: Order, environ: Mapping[str, str]) -> str:
    """What a host is to run: the examination, in the folder and environment of a launch."""
    exports = {k: v for k, v in environ.items() if k.startswith(("PYTHON", "NCCL"))}
    exports |= deepspeed_environment([Path.home(), Path()])
    words = ["env", *(f"{key}={value}" for key, value in exports.items()), sys.executable]
    words += ["-m", "megagpt.doctor", "--order", json.dumps(dataclasses.asdict(order))]
    return f"cd {shlex.quote(str(Path.cwd()))} && " + shlex.join(words)


def deepspeed_environment(folders: Sequence[Path]) -> dict[str, str]:
    """The variables that deepspeed exports to every host: .deepspeed_env, the last folder wins."""
    variables = {}
    for folder in folders:
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for line in path.read_text().splitlines() if path.is_file() else ():
            key, equals, value = line.partition("=")
            if equals:
                variables[key.strip()] = value.strip()
    return variables

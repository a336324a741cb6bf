"""The examination of the hosts of a hostfile by ssh, before anything is launched (stdlib only)."""

import dataclasses
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from megagpt.check.doctor.check import FAIL, OK, Check, Report, as_text, failed, from_tree, merged
from megagpt.check.doctor.compare import Clock, check_clocks, check_same
from megagpt.check.doctor.examine import Order, load
from megagpt.check.doctor.host import Place
from megagpt.check.doctor.shared import folder_of, nonce
from megagpt.errors import EXIT_OK, EXIT_USAGE, UsageError

CONNECT_S = 10
"""Seconds for ssh to reach a host."""
CLOSE_S = 0.5
"""Seconds from a host's answer to the end of ssh, at most."""
AT_ONCE = 64
"""Connections at a time."""


def read_hostfile(path: Path) -> dict[str, int]:
    """Host -> slots, in the file's order, as deepspeed reads it.

    Raises UsageError with every bad line: deepspeed would name one, or train on this host alone
    when the file is missing.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the hostfile ({error.strerror}); give a file with lines such as "
            "`host-a slots=8`"
        ) from None
    found: dict[str, int] = {}
    problems = []
    for number, line in enumerate(lines, 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        match = re.fullmatch(r"(\S+)\s+slots=(\d+)(\s+#.*)?", words)
        if match is None or int(match[2]) < 1:
            problems.append(f"line {number}: {words!r}: must read `HOST slots=N`, N at least 1")
        elif match[1] in found:
            problems.append(f"line {number}: {match[1]} stands there twice; add its slots up")
        else:
            found[match[1]] = int(match[2])
    if not found and not problems:
        problems.append("no host in it; write a line `HOST slots=N` for each")
    if problems:
        raise UsageError(f"{path}:\n" + "\n".join(f"  - {problem}" for problem in problems))
    return found


def examine_by_ssh(order: Order, path: Path) -> int:
    """Prints the table of all hosts of a hostfile; returns the exit code."""
    slots = read_hostfile(path)
    place = Place(hosts=len(slots), ranks=sum(slots.values()), master=next(iter(slots)))
    with nonce(folder_of(load(order))) as written, ThreadPoolExecutor(AT_ONCE) as pool:
        place = dataclasses.replace(place, nonce=written)
        places = [dataclasses.replace(place, ranks_here=n) for n in slots.values()]
        visits = list(pool.map(lambda host, at: visit(order, host, at), slots, places))
    reports = [visit.report for visit in visits if visit.report]
    clocks = [visit.clock for visit in visits if visit.clock]
    checks = [Check("hostfile", OK, f"{path}: {place.hosts} hosts, {place.ranks} ranks")]
    checks += [visit.problem for visit in visits if visit.problem]
    checks += merged(reports)
    if len(reports) > 1:
        checks += check_same(reports)
    checks.append(check_clocks(clocks))
    print(as_text(checks))
    return EXIT_USAGE if failed(checks) else EXIT_OK


@dataclasses.dataclass(frozen=True, slots=True)
class Visit:
    """What came of a visit to one host."""

    report: Report | None = None
    clock: Clock | None = None
    problem: Check | None = None


def visit(order: Order, host: str, place: Place) -> Visit:
    """Looks up, reaches and examines one host of a hostfile."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        # ssh may know the name from its own configuration; the ranks will not.
        remedy = "correct the hostfile, or enter the host in DNS or /etc/hosts"
        return Visit(problem=Check("reach", FAIL, f"{host}: {error.args[-1]}", remedy))
    told = _ssh(host, "date +%s.%N")
    if isinstance(told, Check):
        return Visit(problem=told)
    # Making the connection takes long, its end does not.
    clock = Clock(host, float(told) - time.time() + CLOSE_S / 2, CLOSE_S / 2)
    report = _ssh(host, command(order, place, os.environ))
    if isinstance(report, Check):
        return Visit(clock=clock, problem=report)
    return Visit(dataclasses.replace(from_tree(json.loads(report)), host=host), clock)


def _ssh(host: str, words: str) -> str | Check:
    """The last line that a command printed on a host, or why there is none."""
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}"]
    try:
        done = subprocess.run(["ssh", *options, host, words], capture_output=True, text=True)
    except FileNotFoundError:
        return Check("reach", FAIL, "ssh is not installed here", "install an OpenSSH client")
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        return lines[-1]
    why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode == 255:
        remedy = f"make `ssh {host} true` work without a password: sshd, keys, known_hosts"
    else:
        remedy = f"install the same checkout and Python there: {sys.executable}, {Path.cwd()}"
    return Check("reach", FAIL, f"{host}: {why}", remedy)


def command(order: Order, place: Place, environ: Mapping[str, str]) -> str:
    """What a host is to run: the examination, in the folder and environment of a launch."""
    exports = {k: v for k, v in environ.items() if k.startswith(("PYTHON", "NCCL"))}
    exports |= deepspeed_environment([Path.home(), Path()])
    words = ["env", *(f"{key}={value}" for key, value in exports.items())]
    words += [sys.executable, "-m", "megagpt.doctor"]
    words += [order.run, *order.overrides] if order.run else []
    words += ["--full"] if order.full else []
    words += ["--report", json.dumps(dataclasses.asdict(place))]
    return f"cd {shlex.quote(str(Path.cwd()))} && " + shlex.join(words)


def deepspeed_environment(folders: Sequence[Path]) -> dict[str, str]:
    """The variables that deepspeed exports to every host: .deepspeed_env, the last folder wins."""
    found = {}
    for folder in folders:
        path = folder / os.environ.get("DS_ENV_FILE", ".deepspeed_env")
        for line in path.read_text().splitlines() if path.is_file() else ():
            key, equals, value = line.partition("=")
            if equals:
                found[key.strip()] = value.strip()
    return found

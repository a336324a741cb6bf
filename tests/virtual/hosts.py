"""Virtual hosts on one machine, with real sshd, pdsh and SLURM. Needs root.

A host is a first process in network, host-name, process, mount and IPC namespaces of its own, with
its own /run, /dev/shm, /etc/hosts and sshd; all hosts hang on a bridge, which lies in a namespace
too, and share the file system, as over NFS. Nothing outlives its first process, and every first
process is bound to this one by a parent-death signal: however the tests end, the kernel removes
hosts, daemons, networks and mounts with them.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MEGAGPT = (sys.executable, "-m", "megagpt")
"""By this interpreter, whatever the script of that name has in its first line."""
PROGRAMS = "sshd ssh pdsh munged slurmctld slurmd srun ip unshare nsenter setpriv"
PACKAGES = "slurm-wlm slurmctld slurmd slurm-client munge openssh-server pdsh iproute2"
TIED = ("setpriv", "--pdeathsig", "KILL")
"""Ends with the process that started it."""
NETWORK = "10.77.0."

INIT = """
hostname "$1"; cd "$2"
mount --bind hosts /etc/hosts
mount --bind ssh /etc/ssh
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777 shm /dev/shm
mkdir -p /run/sshd /run/munge
mount --bind slurm /etc/slurm
ip link set lo up
/usr/sbin/sshd -f /etc/ssh/sshd_config -E "$2/log/sshd-$1"
touch "run/$1.ready"
# Process 1 of a host takes in what others leave, which bash does while it waits.
while :; do sleep 3600 & wait $!; done
"""
PROBE = """
ip link add bridge type bridge
ip link add one type veth peer name other
mount -t tmpfs probe /run
"""
SSH_CONFIG = """Host *
  IdentityFile /etc/ssh/id
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
SSHD_CONFIG = """HostKey /etc/ssh/hostkey
AuthorizedKeysFile /etc/ssh/id.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
UsePAM no
MaxStartups 100:30:200
"""


def missing() -> str:
    """Why there can be no virtual hosts here; "" when there can."""
    if os.geteuid() != 0:
        return "virtual hosts need root"
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS.split() if shutil.which(name, path=path) is None]
    if lacking:
        return f"no {', '.join(lacking)}: apt-get install --no-install-recommends {PACKAGES}"
    spaces = ["--net", "--uts", "--pid", "--mount", "--ipc", "--mount-proc", "--fork"]
    tried = subprocess.run(["unshare", *spaces, "sh", "-ec", PROBE], capture_output=True, text=True)
    if tried.returncode != 0:
        return f"this machine lets root make no virtual hosts: {tried.stderr.strip()}"
    return ""


def wait_until(true: Callable[[], object], what: str, timeout_s: float = 240) -> None:
    """Returns once `true()` is; fails with `what` was waited for. The limit is for what never
    comes: a busy machine takes many times as long as an idle one."""
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, f"after {timeout_s} s still not: {what}"
        time.sleep(0.05)


class Host:
    """One virtual host, switched on."""

    def __init__(self, name: str, number: int, cluster: "Cluster") -> None:
        self.name, self.cluster = name, cluster
        self.interface = "lan0" if name == "login" else "eth0"
        """A login host's network card often has another name than that of a compute host."""
        self.address = f"{NETWORK}{number}"
        self.cable = f"to-{name}"
        # The same address of the network card after a reboot: the others remember it.
        self._card = f"02:00:00:00:00:{number:02x}"
        self.switch_on()

    def switch_on(self) -> None:
        """Boots the host and plugs it in."""
        folder = self.cluster.folder
        (folder / "run" / f"{self.name}.ready").unlink(missing_ok=True)
        spaces = ["--net", "--uts", "--pid", "--mount", "--ipc", "--mount-proc"]
        command = ["unshare", *spaces, "--fork", "--kill-child", "bash", "-c", INIT, "init"]
        self._process = subprocess.Popen(
            [*TIED, *command, self.name, str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=(folder / "log" / self.name).open("a"),
            stderr=subprocess.STDOUT,
        )
        wait_until(lambda: (folder / "run" / f"{self.name}.ready").exists(), f"{self.name} boots")
        (self.init,) = children(self._process.pid)
        """Process id of the host's first process, as seen from outside."""
        link = f"link add {self.cable} type veth peer name {self.interface} address {self._card}"
        self.cluster.at_switch(f"ip {link} netns {self.init}")
        self.cluster.at_switch(f"ip link set {self.cable} master bridge up")
        card = self.interface
        self.check(f"ip addr add {self.address}/24 dev {card} && ip link set {card} up")

    def lose_power(self) -> None:
        """From one instant to the next, without a word to the others."""
        self.cluster.at_switch(f"ip link set {self.cable} down")
        os.kill(self.init, signal.SIGKILL)
        self._process.wait()
        # Connections that wait for an answer would keep the dead host's network, and its cable.
        self.cluster.at_switch(f"ip link del {self.cable}")

    @contextlib.contextmanager
    def unplugged(self) -> Iterator[None]:
        """Cut off from the network."""
        self.cluster.at_switch(f"ip link set {self.cable} down")
        try:
            yield
        finally:
            self.cluster.at_switch(f"ip link set {self.cable} up")

    def start(
        self, *command: str, environ: dict[str, str] | None = None, **how: object
    ) -> subprocess.Popen[str]:
        """Starts a command on this host, in the repository's root."""
        spaces = ["--net", "--uts", "--pid", "--mount", "--ipc"]
        inside = ["nsenter", "-t", str(self.init), *spaces, f"--wd={ROOT}", "--"]
        return subprocess.Popen(
            [*TIED, *inside, *command],
            env=environment() | (environ or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **how,
        )

    def run(self, *command: str, timeout_s: float = 300, **how: object) -> tuple[int, str]:
        """(exit code, what it said) of a command on this host."""
        process = self.start(*command, **how)
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            for child in children(process.pid):
                os.kill(child, signal.SIGKILL)
            said, _ = process.communicate()
            raise AssertionError(f"{command}: no end after {timeout_s} s\n{said}") from None
        return process.returncode, said

    def check(self, line: str) -> str:
        """What a line of shell says on this host; it must succeed."""
        code, said = self.run("bash", "-c", line)
        assert code == 0, f"{self.name}: {line}: exit code {code}\n{said}"
        return said

    def processes(self, word: str) -> list[int]:
        """Live processes of this host with `word` in their command line, as seen from outside."""
        space, found = os.readlink(f"/proc/{self.init}/ns/pid"), []
        for entry in Path("/proc").iterdir():
            # A process may end while it is looked at; a zombie's command line is empty.
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and os.readlink(entry / "ns" / "pid") == space:
                    if word.encode() in (entry / "cmdline").read_bytes().replace(b"\0", b" "):
                        found.append(int(entry.name))
        return sorted(found)

    def ranks(self) -> list[int]:
        """The training processes on this host."""
        # What starts them names them too.
        return [p for p in self.processes("-m megagpt.train") if program(p).startswith("python")]


class Cluster:
    """A switch with hosts, and a folder for what they share."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        for name in ("run", "log", "ssh", "slurm"):
            (folder / name).mkdir(parents=True)
        for key in ("id", "hostkey"):
            line = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "ssh" / key)]
            subprocess.run(line, check=True)
        (folder / "ssh" / "ssh_config").write_text(SSH_CONFIG)
        (folder / "ssh" / "sshd_config").write_text(SSHD_CONFIG)
        addresses = [f"{NETWORK}{10 + i} {name}\n" for i, name in enumerate(names)]
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(addresses))
        self._switch = subprocess.Popen([*TIED, "unshare", "--net", "sleep", "infinity"])
        own = os.readlink("/proc/self/ns/net")
        place = f"/proc/{self._switch.pid}/ns/net"
        wait_until(lambda: os.readlink(place) != own, "the switch is there")
        self.at_switch("ip link add bridge type bridge forward_delay 0")
        self.at_switch("ip link set bridge up")
        self.hosts: dict[str, Host] = {}
        for i, name in enumerate(names):
            self.hosts[name] = Host(name, 10 + i, self)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def at_switch(self, line: str) -> None:
        """Runs a command in the switch's network."""
        inside = ["nsenter", "-t", str(self._switch.pid), "--net", *line.split()]
        subprocess.run(inside, check=True, capture_output=True)

    def ranks(self) -> dict[str, list[int]]:
        """Training processes and launchers that live, by host; hosts without any are left out."""
        words = ("megagpt.train", "deepspeed", "torchrun", "srun", "pdsh", "slurmstepd")
        found = {
            n: sorted({p for w in words for p in h.processes(w)}) for n, h in self.hosts.items()
        }
        return {name: processes for name, processes in found.items() if processes}

    def close(self) -> None:
        """Ends everything; the kernel does the same should this never be called."""
        for host in self.hosts.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(host.init, signal.SIGKILL)
            host._process.wait()
        self._switch.kill()
        self._switch.wait()


@contextlib.contextmanager
def virtual_hosts(folder: Path, *names: str) -> Iterator[Cluster]:
    """Hosts for the length of a `with`."""
    cluster = None
    try:
        cluster = Cluster(folder, names)
        yield cluster
    finally:
        if cluster is not None:
            cluster.close()


def program(process: int) -> str:
    """The name of the program that a process runs, "" when it has ended."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


def children(process: int) -> list[int]:
    """Ids of the processes that this one started and that live."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def environment() -> dict[str, str]:
    """A login's environment with this interpreter first, one thread a rank."""
    path = f"{Path(sys.executable).parent}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    found = {"PATH": path, "HOME": "/root", "USER": "root", "LANG": "C.UTF-8"}
    # Python's variables are the ones that deepspeed hands on over ssh.
    found |= {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    return found | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

"""A real SLURM on the virtual hosts: slurmctld on the first, slurmd on the others."""

import os
import re
import secrets
import signal
import time

from tests.virtual.hosts import Cluster, Host, program, wait_until

CONFIGURATION = """
ClusterName=test
SlurmctldHost={login}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits for as long, two minutes by default.
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
MailProg=/bin/true
ReturnToService=2
KillWait=10
# A signal that a busy host does not confirm in this time is sent again a minute later, to the next
# start of the job, whose step has the same number.
MessageTimeout=60
SlurmdTimeout=10
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,sched_min_interval=0,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmdSpoolDir={folder}/spool/%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd-%n
NodeName={nodes} CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=low Nodes={nodes} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes={nodes} PriorityTier=10 PreemptMode=OFF
"""
READY = ("idle", "mixed", "allocated")
"""States of a node that answers."""
GPU = (1, 3)
"""Device numbers of /dev/null, which stands in for a GPU."""


class Slurm:
    """SLURM on all hosts of a cluster; its first is no compute node, its last one a spare one."""

    def __init__(self, cluster: Cluster) -> None:
        self.folder, self.login, *self.nodes, self.spare = cluster.folder, *cluster.hosts.values()
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(1024))
        for number in range(2):
            os.mknod(self.folder / f"gpu{number}", 0o020666, os.makedev(*GPU))
        nodes = ",".join(node.name for node in [*self.nodes, self.spare])
        tree = {"login": self.login.name, "nodes": nodes, "folder": self.folder}
        files = self.folder / "slurm"
        (files / "slurm.conf").write_text(CONFIGURATION.format(**tree))
        (files / "gres.conf").write_text(f"NodeName={nodes} Name=gpu File={self.folder}/gpu[0-1]\n")
        # Slurm 22.05 loads a plugin for control groups in any case; this one needs no mount.
        (files / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        self._authenticate(self.login)
        self.login.check("slurmctld -i")
        for node in self.nodes:
            self.start_node(node)

    def _authenticate(self, host: Host) -> None:
        log = f"{self.folder}/log/munged-{host.name}"
        places = f"--pid-file=/run/munge/pid --seed-file=/run/munge/seed --log-file={log}"
        host.check(f"munged --force --key-file={self.folder}/munge.key {places}")

    def start_node(self, node: Host) -> None:
        """SLURM's daemons on a compute node, after it was switched on; returns when jobs run there
        or may. A job that waited for the node may have it at once, so that it is never idle."""
        (self.folder / "spool" / node.name).mkdir(exist_ok=True)
        self._authenticate(node)
        node.check("slurmd")
        wait_until(lambda: self.state(node) in READY, f"{node.name} takes jobs")

    def stop_node(self, node: Host) -> None:
        """SLURM has the node no more."""
        self.login.check(f"scontrol update nodename={node.name} state=down reason=spare")
        for process in [p for p in node.processes("slurmd") if program(p) == "slurmd"]:
            os.kill(process, signal.SIGKILL)

    def state(self, node: Host) -> str:
        """What sinfo says of a node."""
        return self.login.check(f"sinfo -h -p low -n {node.name} -o %T").strip()

    def submit(self, *words: object) -> int:
        """sbatch; the job's number."""
        code, said = self.login.run("sbatch", *map(str, words))
        found = re.search(r"Submitted batch job (\d+)", said)
        assert code == 0 and found, said
        return int(found[1])

    def job(self, number: int) -> dict[str, str]:
        """What scontrol shows of a job."""
        said = self.login.check(f"scontrol show job {number}")
        return dict(word.split("=", 1) for word in said.split() if "=" in word)

    def queue(self) -> str:
        """What squeue lists, "" when it is empty."""
        return self.login.check("squeue -h").strip()

    def end(self, number: int, timeout_s: float = 300) -> dict[str, str]:
        """The job once it is over: neither waiting, nor running, nor to be queued again."""
        return self.wait(number, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", timeout_s=timeout_s)

    def wait(self, number: int, *states: str, timeout_s: float = 60) -> dict[str, str]:
        """The job once it is in one of these states."""
        until = time.monotonic() + timeout_s
        while (job := self.job(number))["JobState"] not in states:
            assert time.monotonic() < until, f"after {timeout_s} s not {states}: {job}"
            time.sleep(0.1)
        return job

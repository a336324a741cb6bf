"""Jobs that the launch scripts queue again: whom they blame, what they leave out, when they end."""

import os
import shlex
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.lib.corpus import run_file
from tests.test_shell import ROOT, run


class Job:
    """A job of SLURM whose commands write down how they were called, and its run folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "run"
        (root / "bin").mkdir()
        self.stands_in("scontrol", f'echo "$@" >> {root}/scontrol')
        (self.folder / "checkpoints" / "step_00000004").mkdir(parents=True)

    def stands_in(self, name: str, line: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def start(self, training: str, number: str = "7", before: str = "", **more: str):
        """One start of the job, whose training is a line of shell."""
        script = f'{before}source launch/slurm.sh; train_in_job "$1" bash -c "$2"'
        path = f"{self.root}/bin:{os.environ['PATH']}"
        more |= {"PATH": path, "SLURM_JOB_ID": number}
        return run("bash", "-c", script, "job", self.folder, training, **more)

    def told(self, name: str = "scontrol") -> list[str]:
        """How a command was called since this was asked last, to do something."""
        path = self.root / name
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith("show ")]


WHO_FAILED = {
    "srun: error: host-b: task 1: Killed\nsrun: error: host-a: task 0: Terminated": "host-b",
    "srun: error: host-a: task 0: Bus error (core dumped)": "host-a",
    "srun: error: Node failure on nid0042\nsrun: error: nid0001: task 0: Killed": "nid0042",
    # What ended by itself may have waited for another in vain.
    "srun: error: host-a: task 0: Exited with exit code 1\nsrun: error: host-b: task 1: Killed": "",
    "srun: error: host-[a-b]: tasks 0-1: Killed": "",
    "1: srun: error: host-b: task 1: Killed": "",
    # srun names tasks that ended alike together; what comes later is what it ended itself.
    "srun: error: host-b: tasks 0-2,7: Killed\nsrun: error: host-a: task 8: Killed": "host-b",
    "srun: error: host-[a-b]: tasks 0-1: Killed\nsrun: error: host-c: task 2: Killed": "",
}


@pytest.mark.parametrize(("said", "host"), WHO_FAILED.items())
def test_which_host_a_start_failed_on(job, said, host):
    job.start(f"printf '%s\\n' {shlex.quote(said)} >&2; exit 137")
    told = job.folder / "failed_hosts.txt"
    assert (told.read_text().split()[0] if told.exists() else "") == host
    job.start(f"printf '%s\\n' {shlex.quote(said)} >&2; exit 75")
    assert not told.exists() or len(told.read_text().splitlines()) == 1


IN_PARTITION = {"SLURM_JOB_PARTITION": "all", "SLURM_JOB_NUM_NODES": "1"}


def test_a_host_that_failed_is_left_out_of_each_job_once(job):
    # SLURM refuses a list with the name of a host of another site, or with none.
    failed = "host-b x\nhost-a x\nhost-b x\n\n\ngone x\ngone x\n"
    (job.folder / "failed_hosts.txt").write_text(failed)
    job.stands_in("sinfo", "printf 'host-a\\nhost-b\\n'")
    left_out = []
    for number in ("7", "7", "8", "8_3"):
        job.start("exit 1", number, **IN_PARTITION)
        left_out += [line for line in job.told() if line.startswith("update")]
    assert left_out == [f"update JobId={job} ExcNodeList=host-b" for job in ("7", "8", "8_3")]


def test_slurm_is_told_again_of_a_host_that_it_did_not_leave_out(job):
    (job.folder / "failed_hosts.txt").write_text("host-b x\nhost-b x\n")
    job.stands_in("sinfo", "printf 'host-a\\nhost-b\\n'")
    does = 'case "$*" in show\\ hostn*) echo host-b ;; update*) exit 1 ;; esac'
    job.stands_in("scontrol", f'echo "$@" >> {job.root}/scontrol; {does}')
    for number in range(3):
        done = job.start("exit 1", **IN_PARTITION)
        assert job.told() == ["requeue 7", "update JobId=7 ExcNodeList=host-b"], done.stderr
        # The first is queued again before it trains; the others train where SLURM has put them.
        assert ("ended with code 1" in done.stdout) == (number > 0)


@pytest.mark.parametrize(
    ("answer", "address", "trains", "queued"),
    [
        ("host-a host-b host-c", "", "host-a,host-c", 0),
        # The next start goes to the hosts that are left, in the same job.
        ("host-a host-c", "", "host-a,host-c", 0),
        ("host-a host-b", "", "host-a,host-b", 1),
        # Rank 0 has no other address than the one that the site gave it.
        ("host-b host-c", "host-a-fast", "host-c,host-a", 1),
    ],
)
def test_a_job_with_spare_hosts_starts_again_by_itself(job, answer, address, trains, queued):
    (job.folder / "failed_hosts.txt").write_text("host-b x\nhost-b x\n")
    job.stands_in("sinfo", f"echo {answer} | tr ' ' '\\n'")
    lists = '[ "$2" != hostnames ] || printf "host-a\\nhost-b\\nhost-c\\n"'
    job.stands_in("scontrol", f'echo "$@" >> {job.root}/scontrol; {lists}')
    job.stands_in("srun", f'echo "$@" >> {job.root}/srun; exit 1')
    script = 'source launch/slurm.sh; MASTER_ADDR=$2; train_in_job "$1" srun -K1 python'
    more = {"SLURM_JOB_ID": "7", "SLURM_JOB_PARTITION": "all", "SLURM_JOB_NUM_NODES": "3"}
    more |= {"SLURM_JOB_NODELIST": "host-[a-c]", "SLURM_NTASKS_PER_NODE": "8", "SPARE": "1"}
    more |= {"PATH": f"{job.root}/bin:{os.environ['PATH']}", "RETRIES": "2"}
    run("bash", "-c", script, "job", job.folder, address, **more)
    options = f"--nodes=2 --ntasks=16 --nodelist={trains} -K1 python"
    # Three starts in a row without a checkpoint end the job.
    assert job.told("srun") == [options] * (1 if queued else 3)
    assert job.told().count("requeue 7") == queued


@pytest.mark.parametrize("spare", ["3", "99"])
def test_spare_hosts_leave_some_to_train(job, spare):
    script = 'source launch/slurm.sh; train_in_job "$1" srun -K1 python'
    job.stands_in("srun", f"echo >> {job.root}/srun")
    more = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "3", "SPARE": spare}
    more["PATH"] = f"{job.root}/bin:{os.environ['PATH']}"
    done = run("bash", "-c", script, "job", job.folder, **more)
    assert done.returncode == 2 and not (job.root / "srun").exists()
    assert f"SPARE = {spare} of 3 hosts: none is left to train" in done.stderr


FAILED = "FAIL  disk  host-b: 3 GB free"


@pytest.mark.parametrize(("said", "code", "queued"), [("", 2, 0), (FAILED, 2, 1), ("", 1, 1)])
def test_words_that_the_doctor_does_not_take_end_the_job(job, said, code, queued):
    done = job.start(f"echo '{said}'; exit {code}", DOCTOR="1")
    assert job.told() == ["requeue 7"] * queued, done.stderr
    assert queued or done.returncode == 2


@pytest.mark.parametrize(("word", "code", "said"), [("--none", 2, "--none"), ("seed=1", 1, "FAIL")])
def test_what_the_doctor_says_before_a_start_on_several_hosts(job, word, code, said):
    """Words that it does not take are wrong for good; a host may be well the next time."""
    job.stands_in("ssh", "exit 0")
    (job.root / "hosts").write_text("host-a slots=1\nhost-b slots=1\n")
    more = {"HOSTFILE": str(job.root / "hosts"), "DOCTOR": "1"}
    more["PATH"] = f"{job.root}/bin:{os.environ['PATH']}"
    done = run("launch/multinode.sh", run_file(job.root), word, **more)
    assert done.returncode == code and said in done.stdout + done.stderr, done.stderr
    assert ("multinode.sh: see the table above" in done.stderr) == (code == 1)


SINCE = "   SlurmdStartTime=2026-01-01T00:00:00 LastBusyTime=None"


@pytest.mark.parametrize(
    ("number", "says", "blamed"), [("7", SINCE, "host-a"), ("6", SINCE, ""), ("7", "", "")]
)
def test_a_host_that_was_lost_counts_for_the_job_that_it_was_lost_to(job, number, says, blamed):
    (job.folder / ".start").write_text(f"{number} 1700000000 host-a\n")
    job.stands_in("scontrol", f'echo "{says}"')
    job.start("exit 0")
    told = job.folder / "failed_hosts.txt"
    assert (told.read_text().split()[0] if told.exists() else "") == blamed


def test_the_doctor_may_know_a_host_by_its_longer_name(job):
    job.stands_in("scontrol", '[ "$1 $2" != "show hostnames" ] || printf "n1\\nn10\\n"')
    table = "FAIL  disk  n10.site.org: 3 GB free"
    script = f'source launch/slurm.sh; examine "$1" /dev/null echo {shlex.quote(table)}'
    more = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1,10]"}
    path = f"{job.root}/bin:{os.environ['PATH']}"
    done = run("bash", "-c", script, "job", job.folder, PATH=path, **more)
    words = (job.folder / "failed_hosts.txt").read_text().split("\n")
    assert done.returncode == 1 and [line.split()[0] for line in words[:-1]] == ["n10", "n10"]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


@pytest.mark.parametrize(
    ("code", "saves", "queued"),
    [
        (0, True, False),
        (2, False, False),
        (3, True, False),
        # A training that went wrong is tried again only where it got on before.
        (4, False, False),
        (4, True, True),
        (75, False, True),
        # A rank that was killed, a host that was lost, or a crash that may not come back.
        (1, False, True),
        (1, True, True),
        (137, False, True),
        (143, False, True),
    ],
)
def test_a_job_is_queued_again_unless_it_would_fail_the_same_way(job, code, saves, queued):
    new = f"mkdir {job.folder}/checkpoints/step_00000008; " * saves
    done = job.start(new + f"exit {code}")
    assert job.told() == ["requeue 7"] * queued, done.stderr
    assert f"start 1 ended with code {code}" in done.stdout
    assert queued or done.returncode == code


@pytest.mark.parametrize(("answers", "code"), [(False, 0), (True, 1)])
def test_a_slurm_that_does_not_answer_is_asked_again(job, answers, code):
    """One that refuses to queue the job is not."""
    refuses = f"requeue*) grep -q ping {job.root}/scontrol ;; ping) exit {int(not answers)} ;;"
    job.stands_in("scontrol", f'echo "$@" >> {job.root}/scontrol; case "$*" in {refuses} esac')
    done = job.start("exit 1", PAUSE="0")
    assert done.returncode == code, done.stderr
    assert job.told() == ["requeue 7", "ping", *["requeue 7"] * (not answers)]


def test_starts_without_progress_are_counted_and_a_checkpoint_begins_anew(job):
    new = f"mkdir {job.folder}/checkpoints/step_000000$(date +%N | cut -c 1-2)$$; exit 1"
    for training in ("exit 1", "exit 137", new, "exit 1", "exit 143"):
        job.start(training, RETRIES="2")
        assert job.told() == ["requeue 7"]
    done = job.start("exit 1", RETRIES="2")
    assert job.told() == [] and done.returncode == 1
    said = "no checkpoint is new after 3 starts in a row (RETRIES=2): giving up\n"
    assert done.stderr == said
    # Another job has all of its own before it.
    job.start("exit 1", number="8", RETRIES="2")
    assert job.told() == ["requeue 8"]


def test_starts_that_were_told_to_stop_are_no_failures(job):
    for _ in range(3):
        done = job.start(
            "trap '' USR1; exec sleep 9 & p=$!; kill -USR1 $PPID; sleep 1; kill $p; wait $p"
        )
        assert job.told() == ["requeue 7"], done.stderr
        assert "ended with code 143" in done.stdout
    assert not (job.folder / ".retries").exists()


def test_usr1_before_the_training_begins_queues_the_job_again(job):
    before = "trap 'asked=1' USR1; kill -USR1 $$; "
    done = job.start(f"touch {job.root}/trained", before=before)
    assert job.told() == ["requeue 7"], done.stderr
    assert "ended with code 143" in done.stdout and not (job.root / "trained").exists()


def test_a_step_that_does_not_listen_yet_is_told_again(job):
    deaf = (
        "trap '' USR1; kill -USR1 $PPID; sleep 1; trap 'exit 75' USR1; while :; do sleep 0.1; done"
    )
    done = job.start(deaf)
    assert job.told() == ["requeue 7"], done.stderr
    assert "ended with code 75" in done.stdout


@pytest.mark.parametrize(("hears", "code"), [("trap 'exit 75' USR1; ", 75), ("", 138)])
def test_deepspeed_is_not_told_but_its_srun(job, tmp_path, hears, code):
    """It ends with 0 where a signal has ended its srun."""
    job.stands_in("srun", hears + "kill -USR1 $1; while :; do sleep 0.1; done")
    job.stands_in("deepspeed", "srun $PPID; c=$?; [ $c -lt 128 ] || c=0; exit $c")
    script = f'source launch/slurm.sh; PATH={tmp_path}/bin:$PATH; train_in_job "$1" deepspeed'
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = run("bash", "-c", script, "job", job.folder, PATH=path, SLURM_JOB_ID="7")
    assert job.told() == ["requeue 7"], done.stderr
    assert f"ended with code {code}" in done.stdout


def test_a_deepspeed_whose_srun_was_killed_has_not_done_the_run(job, tmp_path):
    """It ends with 0 then, and so it does where the run is done."""
    job.stands_in("deepspeed", "exit 0")
    script = "source launch/slurm.sh; PATH=$3:$PATH; "
    script += 'train_in_job "$1" deepspeed -- -m megagpt.train "$2"'
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    words = ("job", job.folder, run_file(tmp_path), f"{tmp_path}/bin")
    done = run("bash", "-c", script, *words, PATH=path, SLURM_JOB_ID="7")
    assert job.told() == ["requeue 7"], done.stderr
    assert "ended with code 138" in done.stdout


STAGED = {"STAGE": "data/a data/b", "STAGE_TO": "/disk", "SLURM_JOB_NUM_NODES": "3"}


@pytest.mark.parametrize("code", [0, 2, 1])
def test_corpora_are_staged_before_a_start_or_there_is_none(job, tmp_path, code):
    job.stands_in("srun", f'echo "$@" >> {tmp_path}/srun; exit {code}')
    # The doctor looks for the copies.
    done = job.start(f"ls {tmp_path}/srun && touch {tmp_path}/trained", **STAGED, DOCTOR="1")
    staging = f"{sys.executable} -m megagpt data stage data/a data/b /disk"
    assert job.told("srun") == [f"--ntasks=3 --ntasks-per-node=1 --label {staging}"]
    assert (tmp_path / "trained").exists() == (code == 0), done.stderr
    assert job.told() == ["requeue 7"] * (code == 1) and done.returncode == (0, 0, 2)[code]


def test_a_job_that_is_told_to_stop_while_it_stages_is_not_done(job, tmp_path):
    job.stands_in("srun", "trap 'exit 0' USR1; kill -USR1 $PPID; while :; do sleep 0.1; done")
    done = job.start(f"touch {tmp_path}/trained", **STAGED)
    assert job.told() == ["requeue 7"] and not (tmp_path / "trained").exists(), done.stderr


@pytest.mark.parametrize(
    ("said", "host"),
    [
        ("host-b: task 1: Exited with exit code 1", "host-b"),
        ("host-b: task 1: Killed", "host-b"),
        ("Node failure on host-b", "host-b"),
        # What all read may be at fault.
        ("host-[a-b]: tasks 0-1: Exited with exit code 1", ""),
        ("host-a: task 0: Exited with exit code 1\nsrun: error: host-b: task 1: Exited ...", ""),
    ],
)
def test_a_host_that_cannot_stage_is_blamed(job, said, host):
    job.stands_in("srun", f"printf '%s\\n' {shlex.quote('srun: error: ' + said)} >&2; exit 1")
    job.start("exit 0", **STAGED)
    told = job.folder / "failed_hosts.txt"
    assert (told.read_text().split()[0] if told.exists() else "") == host


def test_a_folder_for_scratch_that_is_not_there_ends_no_start(job):
    says = "for i in 1 2 3; do echo srun: error: $i >&2; sleep 0.1; done; exit 75"
    done = job.start(says, TMPDIR=f"{job.root}/none")
    assert "ended with code 75" in done.stdout, done.stderr
    assert done.stderr.count("srun: error: ") == 3 and "mktemp" not in done.stderr


def test_staging_needs_a_place(job):
    done = job.start("exit 0", STAGE="data/a")
    assert done.returncode == 2
    assert done.stderr.endswith(": STAGE = data/a: needs STAGE_TO, a folder of each host's disk\n")


@pytest.mark.parametrize("by", ["variable", "scontrol"])
def test_a_save_that_lasts_beyond_the_end_of_the_job_queues_it_again(job, tmp_path, by):
    told = f"until grep -q requeue {tmp_path}/scontrol; do sleep 0.1; done"
    training = f"trap '' USR1; kill -USR1 $PPID; {told}; exit 1"
    end = int(time.time()) + 22
    if by == "scontrol":
        shown = (
            f"   StartTime=Unknown EndTime={datetime.fromtimestamp(end).isoformat()} Deadline=N/A"
        )
        job.stands_in("scontrol", f'echo "$@" >> {tmp_path}/scontrol; echo "{shown}"')
    job.start(training, SLURM_JOB_END_TIME=str(end) if by == "variable" else "", RETRIES="2")
    # By the watch before the end, and by the start that it ended here.
    assert job.told()[0] == "requeue 7"
    assert (job.folder / ".retries").read_text() == "7 1\n"


def test_scripts_of_jobs_trap_the_signal_before_anything_else():
    for script in ROOT.glob("launch/*.sbatch"):
        code = [line for line in script.read_text().splitlines() if not line.startswith("#")]
        assert code[0].split("  ")[0] == "trap 'asked=1' USR1 USR2 XCPU", script

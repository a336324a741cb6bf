"""Each launcher's environment leads to the right place, and a contradiction to a clear message."""

import pytest

from megagpt.cluster.mpi import mpi_address
from megagpt.cluster.process import prepare_environment
from megagpt.cluster.ranks import Ranks, cores, discover, slurm_address, told_rank
from megagpt.errors import UsageError

MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
DEEPSPEED = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_SIZE": "4",
    **MASTER,
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_WORLD_SIZE": "4",
    **MASTER,
}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)",
    "SLURM_STEP_NODELIST": "node[1-5]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}
"""Also what `deepspeed --launcher slurm` leaves."""
PER_HOST = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}
"""A step with one task on each of four hosts, which starts another launcher."""


@pytest.mark.parametrize(
    ("environ", "launcher"), [(DEEPSPEED, "deepspeed"), (TORCHRUN, "torchrun"), (SRUN, "srun")]
)
def test_a_launchers_environment(environ, launcher):
    expected = Ranks(rank=3, world=8, local_rank=1, local_world=2, launcher=launcher)
    assert discover(environ) == expected


def test_plain_python_is_a_world_of_one():
    assert discover({}) == Ranks(rank=0, world=1, local_rank=0, local_world=1, launcher="python")


def test_a_single_rank_needs_no_meeting_place():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    assert discover(alone).world == 1


def test_a_batch_script_is_one_process_although_the_job_has_many():
    # sbatch sets the job's variables for its script; only srun sets those of a step.
    job = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert discover(job) == Ranks()


def test_a_step_smaller_than_its_job():
    step = SRUN | {"SLURM_STEP_NUM_TASKS": "4"}
    assert discover(step).world == 4


def test_a_host_with_fewer_tasks_than_the_first():
    last = SRUN | {"SLURM_PROCID": "7", "SLURM_LOCALID": "0", "SLURM_NODEID": "4"}
    assert discover(last).local_world == 1


def test_ranks_on_this_host_are_guessed_where_the_launcher_does_not_say():
    unsaid = {k: v for k, v in SRUN.items() if k != "SLURM_STEP_TASKS_PER_NODE"}
    assert discover(unsaid).local_world == 2


@pytest.mark.parametrize(
    ("environ", "launcher"), [(DEEPSPEED, "deepspeed"), (TORCHRUN, "torchrun")]
)
def test_other_launchers_inside_a_step_of_slurm_know_better(environ, launcher):
    assert discover(PER_HOST | environ).launcher == launcher
    assert discover(PER_HOST | environ).rank == 3


def test_what_a_script_exports_by_hand_from_slurms_variables():
    by_hand = SRUN | {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"} | MASTER
    assert discover(by_hand).launcher == "srun"
    assert discover(by_hand).rank == 3


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"RANK": "0"}, "RANK is set, but not WORLD_SIZE and LOCAL_RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "RANK is set, but not LOCAL_RANK;"),
        (
            {"WORLD_SIZE": "8"},
            "WORLD_SIZE = 8, but nothing that is known here tells this process of others",
        ),
        (
            DEEPSPEED | {"RANK": "8"},
            r"rank 8 of 8, rank 1 of 2 on this host \(by deepspeed\): a ra",
        ),
        (
            SRUN | {"SLURM_PROCID": "9"},
            r"rank 9 of 8, rank 1 of 2 on this host \(by srun\): a rank",
        ),
        (
            SRUN | {"SLURM_LOCALID": "2"},
            r"rank 3 of 8, rank 2 of 2 on this host \(by srun\): a rank",
        ),
        (
            SRUN | {"WORLD_SIZE": "2"},
            "WORLD_SIZE = 2, but SLURM_STEP_NUM_TASKS = 8; srun gives each",
        ),
        (
            SRUN | {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "1"} | MASTER,
            "RANK = 0, but SLURM_PROCID = 3; srun gives each task its place by itself: unset RANK",
        ),
        (
            PER_HOST | TORCHRUN | {"GROUP_WORLD_SIZE": "1"},
            r"srun started 4 tasks, but torchrun counts 1 \(GROUP_WORLD_SIZE\); srun must",
        ),
        (
            PER_HOST | DEEPSPEED | {"CROSS_SIZE": "2"},
            r"srun started 4 tasks, but deepspeed counts 2 \(CROSS_SIZE\); srun must",
        ),
        (DEEPSPEED | {"RANK": "x"}, "RANK = 'x': must be a whole number, 0 or more"),
        (DEEPSPEED | {"RANK": "-1"}, "RANK = '-1': must be a whole number, 0 or more"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "2(x4)"}, r"LOCAL_WORLD_SIZE = '2\(x4\)': must be a who"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": ""}, "SLURM_STEP_NUM_TASKS = '': must be a whole"),
        (DEEPSPEED | {"RANK": "9" * 5000}, "RANK = '9{99}: must be a whole number"),
        (DEEPSPEED | {"RANK": "\u0663"}, "RANK = '\u0663': must be a whole number"),
        (TORCHRUN | {"MASTER_PORT": ""}, "MASTER_PORT not set: the 8 ranks need the host name"),
        (TORCHRUN | {"MASTER_PORT": "65536"}, "MASTER_PORT = 65536: must lie between 1 and 65535"),
        (SRUN | {"MASTER_PORT": "x"}, "MASTER_PORT = 'x': must be a whole number, 0 or more"),
    ],
)
def test_contradictions_are_named(environ, message):
    with pytest.raises(UsageError, match=message):
        discover(environ)


def test_environment_for_torch_and_deepspeed():
    environ: dict[str, str] = {}
    prepare_environment(Ranks(), environ)
    assert (environ["RANK"], environ["WORLD_SIZE"], environ["LOCAL_RANK"]) == ("0", "1", "0")
    assert environ["MASTER_ADDR"] == "127.0.0.1" and int(environ["MASTER_PORT"]) > 0
    assert environ["OMP_NUM_THREADS"] == str(cores())
    # Torch remembers the latest collectives of gloo and NCCL for a hang.
    assert int(environ["TORCH_FR_BUFFER_SIZE"]) > 0


def test_the_cores_of_a_host_are_shared_out_and_choices_of_the_user_kept():
    environ = {"OMP_WAIT_POLICY": "ACTIVE", **MASTER}
    many = Ranks(rank=5, world=8, local_rank=1, local_world=1000, launcher="deepspeed")
    prepare_environment(many, environ)
    assert environ["OMP_NUM_THREADS"] == "1"
    assert environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert environ["MASTER_ADDR"] == "node1"


def test_a_single_rank_keeps_its_launchers_meeting_place():
    environ = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", **MASTER}
    prepare_environment(discover(environ), environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("node1", "29500")


def test_srun_needs_no_exported_variables_to_meet():
    environ = dict(SRUN)
    prepare_environment(discover(environ), environ)
    assert environ["MASTER_ADDR"] == "node1"
    assert 20000 <= int(environ["MASTER_PORT"]) < 32000


def test_what_was_exported_for_srun_stays():
    environ = SRUN | {"MASTER_ADDR": "node1-ib"}
    prepare_environment(discover(environ), environ)
    assert environ["MASTER_ADDR"] == "node1-ib"
    assert environ["MASTER_PORT"] == slurm_address(SRUN)[1]


def test_jobs_and_steps_side_by_side_meet_at_ports_of_their_own():
    steps = [
        SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in range(4711, 5711)
        for step in range(8)
    ]
    assert len({slurm_address(step)[1] for step in steps}) == len(steps)


# --- MPI ----------------------------------------------------------------------------------------

PBS = {"PBS_JOBID": "17.head"}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
JSRUN = {
    "JSM_NAMESPACE_RANK": "3",
    "JSM_NAMESPACE_SIZE": "8",
    "JSM_NAMESPACE_LOCAL_RANK": "1",
    "JSM_NAMESPACE_LOCAL_SIZE": "2",
}
PALS = {
    "PALS_RANKID": "3",
    "PALS_LOCAL_RANKID": "1",
    "PMI_RANK": "3",
    "PMI_SIZE": "8",
    "PMI_LOCAL_RANK": "1",
    "PMI_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FLUX = {"FLUX_TASK_RANK": "3", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1"}
MVAPICH = {
    "MV2_COMM_WORLD_RANK": "3",
    "MV2_COMM_WORLD_SIZE": "8",
    "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "2",
}
ALL_MPI = [OPENMPI, JSRUN, PALS, HYDRA, FLUX, MVAPICH]


@pytest.mark.parametrize("environ", ALL_MPI)
def test_mpis_launchers(environ):
    expected = Ranks(rank=3, world=8, local_rank=1, local_world=2, launcher="mpi")
    assert discover(environ | MASTER) == expected
    # A daemon on each host was started by srun, as Open MPI does.
    assert discover(PER_HOST | environ | MASTER) == expected
    assert told_rank(environ) == "3" and told_rank({}) == "0" and told_rank(SRUN) == "3"


def test_srun_with_pmi_is_srun():
    pmi = {"PMI_RANK": "3", "PMI_SIZE": "8", "PMIX_RANK": "3"}
    assert discover(SRUN | pmi).launcher == "srun"


def test_one_process_of_mpi_is_a_world_of_one():
    alone = OPENMPI | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    assert discover(alone) == Ranks()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PBS_NODEFILE", "x1c0\nx1c0\nx2c0\n"),
        ("LSB_DJOB_HOSTFILE", "batch5\nx1c0\nx2c0\n"),
    ],
)
def test_mpis_ranks_meet_on_the_first_host_of_their_job(tmp_path, name, text):
    (tmp_path / "hosts").write_text(text)
    environ = OPENMPI | PBS | {name: str(tmp_path / "hosts")}
    prepare_environment(discover(environ), environ)
    assert environ["MASTER_ADDR"] == "x1c0"
    assert 20000 <= int(environ["MASTER_PORT"]) < 32000
    # The same on every rank, another in another job.
    again = OPENMPI | PBS | {name: str(tmp_path / "hosts"), "OMPI_COMM_WORLD_RANK": "5"}
    other = again | {"PBS_JOBID": "18.head"}
    assert mpi_address(again)[1] == environ["MASTER_PORT"] != mpi_address(other)[1]


def test_mpis_ranks_on_one_host_need_nothing_to_meet():
    environ = OPENMPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}
    prepare_environment(discover(environ), environ)
    assert environ["MASTER_ADDR"] == "127.0.0.1" and 20000 <= int(environ["MASTER_PORT"]) < 32000


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (OPENMPI, "MASTER_ADDR and MASTER_PORT not set: the 8 ranks need the host name of rank 0"),
        (OPENMPI | PBS, "MASTER_ADDR not set: the 8 ranks need"),
        (
            {"PALS_RANKID": "1"},
            "PALS_RANKID is set, but not PMI_SIZE, as PALS sets it; export RANK",
        ),
        (
            {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "4"},
            "HOROVOD_RANK = 0, HOROVOD_SIZE = 4, but nothing that is known here tells this process",
        ),
        ({"NEW_PROCID": "0", "NEW_NTASKS": "2"}, "NEW_PROCID = 0, NEW_NTASKS = 2, but nothing"),
        ({"PMIX_RANK": "2"}, "PMIX_RANK = 2, but nothing that is known"),
        # Of an image or a shell, before the launcher's own.
        (
            OPENMPI | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
            "OMPI_COMM_WORLD_RANK = 3, OMPI_COMM_WORLD_SIZE = 8, but nothing that is known here",
        ),
        # Of the shell in which a job was submitted, itself started by mpirun.
        (
            SRUN | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
            "SLURM_STEP_NUM_TASKS = 8, but nothing .* or unset what another launch has left",
        ),
        (
            {"PMI_RANK": "0", "PMI_SIZE": "1", "NEW_RANK": "1", "NEW_SIZE": "9" * 5000},
            "NEW_RANK = 1, NEW_SIZE = 9{275}, but nothing",
        ),
        (OPENMPI | {"OMPI_COMM_WORLD_SIZE": "\u00b2"}, "must be a whole number, 0 or more"),
    ],
)
def test_a_world_that_cannot_be_told_is_refused(environ, message):
    with pytest.raises(UsageError, match=message):
        discover(environ)


def test_other_variables_tell_of_no_other_processes():
    odd = {
        "OMP_RANK": "0",
        "X_RANK": "0",
        "X_SIZE": "1",
        "PMIX_RANK": "0",
        "A_RANK": "a",
        "A_SIZE": "2",
    }
    assert discover(odd) == Ranks()

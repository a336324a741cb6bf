"""megagpt plan on devices: what fits, what is refused and where refusals lead, the search."""

import json
import shlex
import time
from pathlib import Path

import pytest

from megagpt.cli import main
from megagpt.config import load_run
from megagpt.config.flops import parameters
from megagpt.plan.candidates import Cluster, candidate, candidates
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.judge import decided_by, judge, search, with_higher_start
from megagpt.plan.sanity import oddities, read_times

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "planner" / "published.csv"


@pytest.fixture
def run_file(tmp_path):
    def made(size: str) -> str:
        path = tmp_path / f"{size}.toml"
        path.write_text(
            f'model = "gpt3-{size}"\noutput = "x"\n[data]\ntrain = [{{ path = "{tmp_path}/x" }}]\n'
        )
        return str(path)

    return made


def planned(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["plan", *words])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_nothing_that_does_not_fit_is_accepted(run_file, capsys):
    code, out, err = planned(capsys, run_file("175b"), "parallel.micro_batch=16", "--gpus", "1")
    assert (code, out) == (2, "")
    assert "stage 0 needs 5," in err and "optimizer 2,09" in err
    assert "95% of a h100's memory are 76 GB; nothing works on 1 h100; " in err
    # 80 GB hold 1.3B with 18 bytes a parameter, 40 GB do not hold 2.7B.
    assert planned(capsys, run_file("1.3b"), "--gpus", "1", "--gpu", "h100")[0] == 0
    assert planned(capsys, run_file("2.7b"), "--gpus", "1", "--gpu", "a100-40")[0] == 2


@pytest.mark.parametrize(
    ("size", "gpus"),
    [
        ("125m", 24),
        ("350m", 100),
        ("760m", 1000),
        ("13b", 3),
        ("2.7b", 3),
        ("6.7b", 1),
        ("13b", 8),
        ("175b", 1),
        ("175b", 1024),
    ],
)
def test_refusals_lead_to_a_plan_that_is_accepted(run_file, capsys, size, gpus):
    file = run_file(size)
    code, _, err = planned(capsys, file, "--gpus", str(gpus))
    if code == 0:
        return
    line = next(line for line in err.splitlines() if "parallel.ds_config=" in line)
    count = gpus
    if "can do it" in line:
        count = int(line.split(" can do it")[0].split("; ")[-1].replace(",", ""))
        assert count != gpus
    keys = shlex.split(line[line.index("parallel.ds_config=") :])
    code, out, err = planned(capsys, file, *keys, "--gpus", str(count))
    assert code == 0, err
    assert "whole run: " in out


@pytest.mark.slow
def test_every_refusal_of_the_run_files_leads_to_a_plan_that_is_accepted(capsys):
    refused = 0
    for file in sorted((PUBLISHED.parents[2] / "launch" / "runs").glob("gpt3-*.toml")):
        for gpus in (1, 3, 8, 24, 100, 512, 1000, 4096):
            code, _, err = planned(capsys, str(file), "--gpus", str(gpus))
            if code == 0:
                continue
            refused += 1
            lines = [line for line in err.splitlines() if "parallel.ds_config=" in line]
            assert lines, (file, gpus, err)
            for line in lines:
                head = line.split(" can do it")[0].replace("and ", "; ").split("; ")[-1]
                count = head.replace(",", "") if " can do it" in line else str(gpus)
                keys = shlex.split(line[line.index("parallel.ds_config=") :])
                code, _, err = planned(capsys, str(file), *keys, "--gpus", count)
                assert code == 0, (file, gpus, line, err)
    assert refused > 20


def test_what_is_printed_adds_up(run_file, capsys):
    words = [run_file("6.7b"), "--gpus", "32", "parallel.recompute=full", "--price", "2"]
    code, out, _ = planned(capsys, *words, "--json")
    made = json.loads(out)
    [one] = made["layouts"]
    assert code == 0 and one["fits"] and len(made["ramp"]) == 64
    assert sum(one["items"].values()) == pytest.approx(one["step_seconds"])
    assert max(sum(s.values()) for s in one["stages"]) == pytest.approx(one["memory_bytes"])
    assert one["gpu_hours"] == pytest.approx(one["days"] * 24 * 32)
    assert one["dollars"] == pytest.approx(2 * one["gpu_hours"])
    # 300B tokens at the MFU of the full batch: the ramp only adds.
    model = made["flops"] / (32 * 989e12 * one["mfu"]) / 86_400
    assert model < one["days"] < 1.2 * model
    assert 1.2 < one["hfu"] / one["mfu"] < 1.34
    low, high = one["step_interval"]
    assert low < one["step_seconds"] < high
    assert planned(capsys, *words)[1].count("\n") < 50


def test_json_holds_all_that_the_text_tells(run_file, tmp_path, capsys):
    words = [run_file("125m"), "--gpus", "32", "--search", "--simulate"]
    words += ["--write", str(tmp_path / "plan"), "--picture", str(tmp_path / "plan.png"), "--json"]
    code, out, err = planned(capsys, *words)
    made = json.loads(out)
    assert (code, err) == (0, "")
    assert [Path(path).exists() for path in made["wrote"]] == [True] * 5
    assert [one["saves"] for one in made["simulation"]] == ["as the run file saves", "at best"]
    low, middle, high = made["simulation"][0]["days"]
    assert low < middle < high and len(made["simulation"][0]["ends"]) == 3
    assert len(made["layouts"]) == 10
    for one in made["layouts"]:
        for name, value in one.items():
            if f"{name}_interval" in one:
                least, most = one[f"{name}_interval"]
                assert least < value < most
        assert one is made["layouts"][0] or one["loses_seconds"] >= 0
    assert len(made["layouts"][0]["seconds_by_batch"]) == len(made["ramp"])
    assert made["higher_start"]["days"] < made["layouts"][0]["days"]
    assert 0 < made["ramp_days"] < made["layouts"][0]["days"] and "idle: " in made["idle"]
    assert made["checkpoint_bytes"] == 12 * made["parameters"] and made["stages"][0]["blocks"] == 12
    # Nothing is judged where no device was named.
    bare = json.loads(planned(capsys, run_file("125m"), "--json")[1])
    assert bare["layouts"] == [] and bare["ramp_days"] is None and bare["pf_days"] > 2
    table = str(PUBLISHED), "--output", str(tmp_path / "out.csv")
    assert json.loads(planned(capsys, "--batch", *table, "--json")[1])["rows"] == 426


def test_memory_is_counted_once(run_file, capsys):
    """What the text says of stages, of the layout and of the run is one count, exact for states."""
    words = [run_file("175b"), "parallel.pipeline=16", "parallel.tensor=8", "--gpus", "1024"]
    words += ["parallel.ds_config=pipeline", "parallel.recompute=full"]
    made = json.loads(planned(capsys, *words, "--json")[1])
    [one] = made["layouts"]
    for stage, sizes in zip(made["stages"], one["stages"], strict=True):
        each = sizes["weights"] + sizes["gradients"] + sizes["optimizer"]
        # Weights, fp32 gradients; a copy of a rank's own, master and moments over 8 data ranks.
        assert each == pytest.approx((2 + 4 + 16 / 8) * stage["parameters"])
    out = planned(capsys, *words)[1]
    assert f"memory: {8 * made['stages'][0]['parameters'] / 1e9:.3g} GB on the fullest" in out
    assert " 1-14 " in out


def test_weights_that_zero_3_gathers_are_counted_once(run_file):
    config = load_run(run_file("13b"), ["parallel.ds_config=zero3"])
    [stage] = judge(candidate(config, 64), Cluster(gpu="h100", gpus=64)).stages
    # DeepSpeed's own bounds: 10^9 live weights of 2 bytes, two buckets of 5 x 10^8 gradients of 2.
    assert stage["buffers"] == 2e9 + 2 * 2 * 5e8


@pytest.mark.parametrize(
    "keys", [["ds_config=zero1"], ["ds_config=zero3"], ["ds_config=pipeline", "pipeline=4"]]
)
def test_a_small_model_is_planned_with_the_bucket_that_the_engine_takes(run_file, keys):
    config = load_run(run_file("125m"), [f"parallel.{key}" for key in keys])
    one = candidate(config, 8)
    made = resolve(config, one.layout, read_ds_config(config.parallel.ds_config))
    size = made["zero_optimization"]["reduce_bucket_size"]
    buckets = judge(one, Cluster(gpu="h100", gpus=8)).stages[-1]["buffers"]
    if one.zero == 3:
        # 16-bit gradients twice (overlap_comm), and every weight alive.
        assert buckets == 2 * 2 * size + 2 * size
    else:
        passed = 2 * 2 * 2048 * 768 * (config.parallel.pipeline > 1)
        assert buckets == 4 * size + passed and size < 126e6


def test_the_hosts_memory_is_counted_for_the_fullest_stage(run_file, tmp_path):
    tree = read_ds_config("pipeline")
    tree["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    (tmp_path / "own.json").write_text(json.dumps(tree))
    keys = [f"ds_config={tmp_path}/own.json", "dtype=fp32", "pipeline=8"]
    config = load_run(run_file("125m"), [f"parallel.{key}" for key in keys])
    one = judge(candidate(config, 64), Cluster(gpu="h100", gpus=64))
    held = [stage["weights"] / 4 for stage in one.stages]
    assert max(held) > held[-2] and one.host["optimizer"] == 12 * max(held)


def test_offload_to_no_device_is_none(run_file, tmp_path):
    tree = read_ds_config("zero3_offload")
    shares = {}
    for device in ("none", "cpu"):
        for what in ("optimizer", "param"):
            tree["zero_optimization"][f"offload_{what}"]["device"] = device
        path = tmp_path / f"{device}.json"
        path.write_text(json.dumps(tree))
        config = load_run(run_file("1.3b"), [f"parallel.ds_config={path}"])
        one = judge(candidate(config, 8), Cluster(gpu="h100", gpus=8))
        shares[device] = one.stages[0]["optimizer"], one.stages[0]["weights"], one.step
    plain = load_run(run_file("1.3b"), ["parallel.ds_config=zero3"])
    one = judge(candidate(plain, 8), Cluster(gpu="h100", gpus=8))
    assert shares["none"] == (one.stages[0]["optimizer"], one.stages[0]["weights"], one.step)
    assert shares["cpu"][:2] == (0, 0) and shares["cpu"][2] > one.step


def test_the_long_ramp_is_shortened_but_not_in_json(run_file, capsys):
    words = [run_file("175b"), "parallel.pipeline=16", "parallel.tensor=8", "--gpus", "1024"]
    words += ["parallel.ds_config=pipeline", "parallel.recompute=full"]
    _, out, _ = planned(capsys, *words)
    assert "12 of 96 rows; all of them with --json" in out
    assert len(json.loads(planned(capsys, *words, "--json")[1])["ramp"]) == 96


def test_search_finds_the_best_of_all_and_tells_why_others_lose(run_file, capsys):
    config, cluster = load_run(run_file("2.7b")), Cluster(gpu="a100-40", gpus=4)
    best = search(config, cluster)
    everything = [judge(one, cluster) for one in candidates(config, cluster)]
    steps = sorted(one.step for one in everything if one.fits and one.surely_fits)
    assert [one.step for one in best] == pytest.approx(steps[:10])
    # 125 sequences of a rank: no power of two divides them.
    batch = [f"schedule.{key}=2048000" for key in ("batch_tokens", "ramp_start_tokens")]
    odd = load_run(run_file("125m"), batch)
    [one] = search(odd, Cluster(gpu="h100", gpus=8), 1)
    assert one.candidate.config.parallel.micro_batch == 25
    item, seconds = decided_by(best[1], best[0])
    assert seconds == pytest.approx(best[1].items[item] - best[0].items[item]) and seconds >= 0
    code, out, _ = planned(capsys, run_file("2.7b"), "--gpus", "4", "--gpu", "a100-40", "--search")
    assert code == 0 and f"use the first: {' '.join(best[0].candidate.keys)}" in out
    assert "s a step by " in out


def test_a_search_over_4096_gpus_takes_seconds(run_file, capsys):
    start = time.process_time()
    assert planned(capsys, run_file("175b"), "--gpus", "1536", "--search")[0] == 0
    assert time.process_time() - start < 20


def test_a_ramp_that_starts_higher_saves_time(run_file):
    config, cluster = load_run(run_file("125m")), Cluster(gpu="h100", gpus=32)
    one = judge(candidate(config, 32), cluster)
    higher = with_higher_start(one)
    assert higher is not None and higher.days < one.days
    assert higher.candidate.config.schedule.ramp_start_tokens == 65_536
    eight = Cluster(gpu="h100", gpus=8)
    assert with_higher_start(judge(candidate(config, 8), eight)) is None


def test_more_is_told_of_odd_runs(run_file, tmp_path):
    config = load_run(run_file("125m"), ["schedule.total_tokens=1000000000"])
    found = "\n".join(oddities(config))
    assert "schedule.ramp_tokens = 4000000000: the batch never reaches batch_tokens within" in found
    assert (
        "schedule.decay_tokens = 260000000000: the learning rate never reaches its floor" in found
    )
    assert "warmup" not in found and "is read" not in found
    short = load_run(run_file("125m"), ["schedule.total_tokens=100000000"])
    assert (
        "schedule.warmup_tokens = 375000000: the learning rate never reaches its peak"
        in "".join(oddities(short))
    )
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "manifest.json").write_text('{"totals": {"tokens": 200000000}}')
    assert read_times("x", 65912.3) == "x is read 65,912 times"
    assert f"{tmp_path}/x is read 5.00 times; more than about 4" in "\n".join(oddities(config))


def test_where_nothing_works_fewer_and_more_are_named(run_file, capsys):
    _, _, err = planned(capsys, run_file("350m"), "--gpus", "100")
    *_, first, second = err.splitlines()
    # 96: three stages of 32 data ranks; 128: data ranks alone.
    assert "nothing works on 100 h100; 96 can do it: pipeline 3 x data 32 " in first
    assert second.startswith("and 128 can do it: pipeline 1 x data 128 x tensor 1, zero")
    # Near is near for the largest clusters too.
    err = planned(capsys, run_file("175b"), "--gpus", "100000", "--search")[2]
    assert "nothing works on 100,000 h100; 65,536 can do it: " in err
    assert "\nand 131,072 can do it: " in err


def test_more_devices_than_the_batch_has_work_for(run_file, capsys):
    err = planned(capsys, run_file("125m"), "--gpus", "100000")[2]
    line = err.splitlines()[-1]
    count = int(line.split(" can do it")[0].split("; ")[-1].replace(",", ""))
    assert count < 100_000
    keys = shlex.split(line[line.index("parallel.ds_config=") :])
    assert planned(capsys, run_file("125m"), *keys, "--gpus", str(count))[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpu", "8"], "--gpu 8: must be one of v100-16, v100-pcie, v100, a100-40"),
        (["--gpu", "Tesla V100-SXM2-32GB"], "'bf16': v100 has no bf16; set it to fp16"),
        (["--gpus", "8", "--network", "fast"], "--network fast: must be like 400G"),
        (["--gpus", "8", "--network", "0"], "--network 0: must be like 400G"),
        (["--gpus", "8", "--gpus-per-node", "0"], "--gpus-per-node 0: must be at least 1"),
        (["--gpus", "8", "--nvlink-domain", "-8"], "--nvlink-domain -8: must be at least 1"),
        (["--gpus", "8", "--price", "-1"], "--price -1.0: must be dollars for a GPU-hour"),
        (["--search"], "--search needs --gpus N of at least 1, got None"),
        (["--simulate"], "--simulate, --picture and --write need --gpus N"),
        (["--search", "--gpus", "0"], "--search needs --gpus N of at least 1, got 0"),
        (
            ["parallel.dtype=fp16", "--search", "--gpus", "1", "--gpu", "v100-16"]
            + ["--host-memory", "64"],
            "nothing works on 1 v100-16; ",
        ),
        (["--gpus", "8", "--host-memory", "-1"], "--host-memory -1.0: must be GB of a node, 0 or"),
        (["--batch", "rows.csv"], "--batch ROWS.csv needs --output OUT.csv, and no run file"),
    ],
)
def test_what_cannot_be_planned(run_file, capsys, words, message):
    code, out, err = planned(capsys, run_file("13b"), *words)
    assert (code, out) == (2, "") and message in err


def test_what_is_offloaded_must_fit_in_the_host(run_file, capsys):
    words = [run_file("13b"), "parallel.ds_config=zero3_offload", "--gpus", "8", "--json"]
    one = json.loads(planned(capsys, *words)[1])["layouts"][0]
    held = parameters(load_run(words[0]).model)
    # 12 bytes of fp32 weights and moments, gradients twice, 2 of weights; nothing on the devices.
    sizes = {"optimizer": 12 * held, "gradients": 8 * held, "weights": 2 * held}
    assert one["host_bytes"] == pytest.approx(sizes, rel=0.01)
    assert [one["stages"][0][name] for name in sizes] == [0, 0, 0]
    assert "host of a node: 28" in planned(capsys, *words[:-1])[1]
    # Two nodes share it. NVMe takes all but gradients that add up; each rank has 4 buffers of a
    # sub-group in fp32 and 5 of 10^8 weights in 16 bits.
    sixteen = json.loads(planned(capsys, *words, "--gpus", "16")[1])["layouts"][0]["host_bytes"]
    assert sixteen == pytest.approx({k: v / 2 for k, v in sizes.items()}, rel=0.01)
    disk = json.loads(planned(capsys, *words, "parallel.ds_config=zero3_nvme")[1])["layouts"][0]
    sizes = {"gradients": 4 * held, "buffers": 8 * (4 * 4 * 1e9 + 5 * 2 * 1e8)}
    assert disk["host_bytes"] == pytest.approx(sizes, rel=0.01)
    code, _, err = planned(capsys, *words, "--host-memory", "256")
    assert code == 2 and "offload needs 28" in err and " GB of a node's host (optimizer 15" in err
    assert "95% of its memory (--host-memory) are 243 GB; what works on 8 h100:" in err
    assert "parallel.ds_config=zero3_offload" not in err


def test_a_run_file_is_needed(capsys):
    assert planned(capsys)[0] == 2
    assert "megagpt plan needs a run file, or --batch" in planned(capsys)[2]


def test_a_gpu_is_known_by_its_drivers_name(run_file, capsys):
    words = run_file("125m"), "--gpus", "8", "--gpu"
    for name in ("a100-40", "NVIDIA A100-SXM4-40GB"):
        assert "\non 8 a100-40: " in planned(capsys, *words, name)[1]
    assert "\non 8 h100: " in planned(capsys, *words, "H100")[1]


def test_networks_and_domains_matter(run_file):
    config = load_run(run_file("13b"), ["parallel.ds_config=zero3", "parallel.recompute=full"])
    slow, fast = (
        judge(candidate(config, 64), Cluster(gpu="h100", gpus=64, node_gb=gb)).step
        for gb in (100, 3200)
    )
    assert slow > 1.2 * fast
    rack = Cluster(gpu="gb200", gpus=64, per_node=4, domain=64)
    assert any(one.layout.tensor == 40 for one in candidates(config, Cluster(
        gpu="gb200", gpus=40, per_node=4, domain=72)))  # fmt: skip
    near = judge(candidate(config, 64), rack).step
    apart = judge(candidate(config, 64), Cluster(gpu="gb200", gpus=64, per_node=4, domain=4)).step
    assert near <= apart

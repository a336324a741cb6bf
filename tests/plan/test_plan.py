"""megagpt plan: the ramp's table against the walk itself, and what the command prints."""

import pytest

from megagpt.cli import main
from megagpt.config import load_run
from megagpt.plan.accelerators import peak_tflops
from megagpt.plan.layout import Layout
from megagpt.plan.ramp import HEAD, ramp, ramp_as_text

GPT3 = 'model = "gpt3-125m"\noutput = "x"\n[data]\ntrain = [{ path = "x" }]\n'


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(GPT3)
    return path


def test_rows_cover_the_run_without_gaps(run_file):
    config = load_run(run_file)
    rows = ramp(config, Layout(world=8))
    assert rows[0].first_tokens == 0
    assert rows[-1].last_tokens == config.schedule.end_tokens
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        assert row.last_tokens - row.first_tokens == row.n_steps * row.batch_tokens
        # Eight ranks, one sequence of 2,048 tokens a pass.
        assert row.accumulation == row.batch_tokens // 2048 // 8
        if after is not None:
            assert after.first_tokens == row.last_tokens
            assert after.batch_tokens > row.batch_tokens
    assert rows[-1].last_lr == pytest.approx(6e-5)


def test_hand_numbers_of_gpt3_125m(run_file):
    first, *_, last = ramp(load_run(run_file), Layout(world=1))
    assert (first.batch_tokens, first.accumulation) == (32_768, 16)
    # 6e-4 after 375M tokens, so the first step of 32,768 tokens has:
    assert first.first_lr == pytest.approx(6e-4 * 32_768 / 375e6)
    assert (last.batch_tokens, last.accumulation) == (524_288, 256)


def test_table_is_aligned(run_file):
    text = ramp_as_text(ramp(load_run(run_file), Layout()))
    lines = text.splitlines()
    assert len({len(line) for line in lines}) == 1
    assert all(name in lines[0] for name in HEAD)
    assert len(lines) == 17


def test_the_command(run_file, capsys):
    assert main(["plan", str(run_file), "parallel.micro_batch=2", "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "125,226,240 parameters, 12 layers" in out
    assert "8 ranks = data 8, ZeRO stage 1, micro-batch up to 2, bf16" in out
    # The paper's Table D.1 gives 2.60 PF-days for its rounded 125M parameters.
    assert " 2.61 PF-days (6 a parameter and token)" in out


def test_it_tells_how_long_which_ranks_are_idle(run_file, capsys):
    assert main(["plan", str(run_file), "--gpus", "32"]) == 0
    out = capsys.readouterr().out
    # 16 sequences on 32 ranks, then 32 on 32, then 48 on 64 passes.
    assert out.count("50%") == 1 and out.count(" 25%") == 1
    [line] = [line for line in out.splitlines() if line.startswith("idle: ")]
    assert "cannot share the batch evenly; none with schedule.ramp_start_tokens = 65536" in line
    assert main(["plan", str(run_file), "--gpus", "32", "schedule.ramp_start_tokens=65536"]) == 0
    assert "idle: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA B300 SXM6 AC", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GB300", 2500),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("Tesla V100-SXM2-32GB", 125),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA GeForce GTX 1080", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("NVIDIA A10", None),
    ],
)
def test_peaks_by_the_drivers_names(device, peak):
    assert peak_tflops(device) == peak


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "24"], "256 sequences, which must be a multiple of the 24 data ranks"),
        (["--gpus", "-1"], "-1 ranks: must be a positive multiple of pipeline x tensor"),
        (["--gpus", "0"], "pipeline x tensor (1 x 1 = 1); use 1\n"),
        (["parallel.ds_config=zero0"], "zero_optimization.stage = 0 with parallel.dtype = 'bf16'"),
        (["modle=x"], "unknown key 'modle' (did you mean 'model'?)"),
    ],
)
def test_a_run_that_cannot_go_is_refused_with_exit_code_2(run_file, capsys, arguments, message):
    assert main(["plan", str(run_file), *arguments]) == 2
    found = capsys.readouterr()
    assert message in found.err
    assert found.out == ""

"""What computes a run: decided by device, said once, and what the environment must hold for it."""

import dataclasses
import json
import logging
import subprocess
import sys

import pytest
import torch

from megagpt.config import parse_run
from megagpt.engine import device as devices
from megagpt.engine.device import Choices, apply, choose, environment
from megagpt.model import GPT
from megagpt.model.kernels import attention, loss
from megagpt.plan.layout import Layout

CPU = torch.device("cpu")
RUN = """
model = "gpt3-125m"
output = "runs/x"
data.train = [{ path = "data" }]
"""


def choices_on_cuda(monkeypatch, *overrides: str, triton: bool = True, **options: int) -> Choices:
    """What a run chooses on a GPU that is not there: the card is not asked, all else is."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(devices, "_sdpa_backend", lambda *_: "cudnn")
    monkeypatch.setattr(attention, "_flex_fuses", lambda: triton)
    lacking = "" if triton else "Triton"
    monkeypatch.setattr(loss, "missing_for_triton", lambda: lacking)
    monkeypatch.setattr(devices, "missing_compiler", lambda _: lacking)
    stage = options.pop("stage", 1)
    run = parse_run(RUN, overrides)
    layout = Layout(world=options.get("tensor", 1), **options)
    return choose(run, layout, torch.device("cuda"), stage)


def test_a_gpu_gets_its_fast_forms_by_default(monkeypatch):
    chosen = choices_on_cuda(monkeypatch, "model.vocab_multiple=128")
    assert chosen.attention == {"dense": "sdpa cudnn", "banded": "flex"}
    assert (chosen.loss, chosen.compile, chosen.deterministic) == ("triton", "blocks", False)
    assert chosen.output_rows == 50_304
    assert chosen.slow == ()
    assert chosen.device == "cuda (NVIDIA H100 80GB HBM3)"
    assert json.loads(json.dumps(dataclasses.asdict(chosen)))["attention"]["banded"] == "flex"


def test_a_tensor_split_gets_the_fused_loss_too(monkeypatch):
    chosen = choices_on_cuda(monkeypatch, tensor=2)
    assert (chosen.loss, chosen.slow) == ("triton", ())


def test_a_band_as_wide_as_the_context_is_called_dense(monkeypatch):
    """What the log says is what attend() does; flex_attention's lack of dropout does not matter."""
    words = ("model.band_width=2048", "model.dropout=0.1")
    chosen = choices_on_cuda(monkeypatch, *words)
    assert chosen.attention == {"dense": "sdpa cudnn", "banded": "sdpa cudnn"}
    assert chosen.slow == ()


def test_a_cpu_gets_its_own(caplog, monkeypatch):
    monkeypatch.setattr(attention, "BF16_PRODUCTS", False)
    chosen = choose(parse_run(RUN), Layout(), CPU)
    assert chosen.attention == {"dense": "sdpa flash", "banded": "blocks"}
    [reason] = chosen.slow
    assert reason.startswith("this CPU does not multiply bf16")
    monkeypatch.setattr(attention, "BF16_PRODUCTS", True)
    chosen = choose(parse_run(RUN), Layout(), CPU)
    assert chosen.attention == {"dense": "tiles", "banded": "tiles"}
    assert (chosen.loss, chosen.compile, chosen.slow) == ("sliced", "no", ())
    wide = choose(parse_run(RUN, ["parallel.dtype=fp32"]), Layout(), CPU)
    assert wide.attention == {"dense": "sdpa flash", "banded": "blocks"} and wide.slow == ()
    with caplog.at_level(logging.INFO):
        apply(chosen, first=False)
        apply(chosen, first=True)
    [line] = caplog.messages
    assert line.startswith("cpu: attention dense tiles, banded tiles; loss sliced; compile no;")


@pytest.mark.parametrize(
    ("overrides", "options", "reason"),
    [
        (["model.dropout=0.1"], {}, "banded attention without flex_attention (it has no dropout)"),
        (
            ["model.n_head=96"],
            {},
            "banded attention without flex_attention (heads are 8 wide, it takes 16 and more)",
        ),
        (
            [],
            {"triton": False},
            "banded attention without flex_attention (this host has not Triton)",
        ),
        ([], {"triton": False}, "the loss in several passes over the logits (expressions)"),
        ([], {"triton": False}, "parallel.compile = auto, but this host has not Triton"),
        ([], {"stage": 3}, "nothing is compiled: ZeRO-3's hooks"),
        (["parallel.compile=true"], {"stage": 3}, "nothing is compiled: ZeRO-3's hooks"),
        (["model.vocab_size=50001"], {}, "rows of the output matrix, no multiple of 8"),
        (
            [],
            {"tensor": 2, "triton": False},
            "the loss in several passes over the logits (expressions)",
        ),
    ],
)
def test_a_slow_form_on_a_gpu_is_named(monkeypatch, caplog, overrides, options, reason):
    # Without the padding that plan.layout gives, so that one can see what it is for.
    exact = lambda config, _: config.model  # noqa: E731
    monkeypatch.setattr(devices, "padded_model", exact)
    chosen = choices_on_cuda(monkeypatch, *overrides, **options)
    with caplog.at_level(logging.WARNING):
        apply(chosen, first=True)
    assert any(message.startswith("slow: ") and reason in message for message in caplog.messages)


def test_compile_is_auto_true_or_false(monkeypatch):
    for value, cpu, cuda in (("auto", "no", "blocks"), ("false", "no", "no")):
        override = f"parallel.compile={value}"
        assert choose(parse_run(RUN, [override]), Layout(), CPU).compile == cpu
        assert choices_on_cuda(monkeypatch, override).compile == cuda
    monkeypatch.undo()
    monkeypatch.setattr(devices, "missing_compiler", lambda _: "")
    always = parse_run(RUN, ["parallel.compile=true"])
    assert [choose(always, Layout(), CPU, stage).compile for stage in (1, 3)] == ["model", "no"]


def test_dynamo_is_never_switched_off_on_a_gpu():
    """flex_attention without it writes out T x T scores."""
    for value in ("auto", "false", "true"):
        found = environment(parse_run(RUN, [f"parallel.compile={value}"]), True, 1)
        assert "TORCHDYNAMO_DISABLE" not in found
        assert int(found["TORCHINDUCTOR_COMPILE_THREADS"]) >= 1
    for value in ("auto", "false"):
        found = environment(parse_run(RUN, [f"parallel.compile={value}"]), False, 1)
        assert found == {"TORCHDYNAMO_DISABLE": "1"}


def test_inductors_processes_are_shared_out_over_the_ranks_of_a_host(monkeypatch):
    monkeypatch.setattr(devices, "cores", lambda: 96)
    run = parse_run(RUN)
    threads = [environment(run, True, n)["TORCHINDUCTOR_COMPILE_THREADS"] for n in (1, 8, 200)]
    assert threads == ["32", "12", "1"]


def test_what_a_deterministic_run_asks_for():
    run = parse_run(RUN, ["parallel.deterministic=true"])
    found = environment(run, True, 1)
    assert found["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert found["NCCL_ALGO"] == "Ring"
    assert found["TORCHINDUCTOR_DETERMINISTIC"] == "1"
    code = (
        "import os, torch; os.environ['TORCHINDUCTOR_DETERMINISTIC'] = '1'\n"
        "import torch._inductor.config as inductor\n"
        "from tests.engine.test_device import RUN, parse_run, choose, apply, Layout, CPU\n"
        "run = parse_run(RUN, ['parallel.deterministic=true'])\n"
        "apply(choose(run, Layout(), CPU), first=True)\n"
        "print(torch.are_deterministic_algorithms_enabled(), inductor.deterministic,\n"
        "      torch.utils.deterministic.fill_uninitialized_memory,\n"
        "      torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "True", "False", "False"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_deterministic_mode_changes_no_bit_on_a_cpu(dtype):
    from tests.model.test_model import BANDED, batch, build

    config = dataclasses.replace(BANDED, dropout=0.1)
    gradients = []
    try:
        for mode in (False, True):
            torch.use_deterministic_algorithms(mode)
            model: GPT = build(config).to(dtype)
            torch.manual_seed(0)
            model(*batch(config)).backward()
            gradients.append([p.grad for p in model.parameters()])
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_kernel_of_a_deterministic_run_is_asked_for_in_its_mode(monkeypatch):
    """Asked before, scaled_dot_product_attention would name cuDNN, which it then leaves out."""
    modes, real = [], torch._fused_sdp_choice

    def ask(*arguments: object, **options: object) -> int:
        modes.append(torch.are_deterministic_algorithms_enabled())
        return real(*arguments, **options)

    monkeypatch.setattr(torch, "_fused_sdp_choice", ask)
    for mode in ("false", "true"):
        run = parse_run(RUN, ["parallel.dtype=fp32", f"parallel.deterministic={mode}"])
        choose(run, Layout(), CPU)
    assert modes == [False, True]
    assert not torch.are_deterministic_algorithms_enabled()

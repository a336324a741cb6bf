"""torch.compile: the same figures, less memory kept, and going on where there is no compiler."""

import importlib.util
import logging
import shutil
import sys
import sysconfig

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megagpt.config import parse_run
from megagpt.engine.compiler import compile_model, missing_compiler
from megagpt.engine.device import apply, choose
from megagpt.model import GPT
from megagpt.model.kernels import missing_for_triton
from megagpt.plan.layout import Layout
from tests.lib.corpus import run_file
from tests.lib.distributed import launch, steps, trained
from tests.model.test_model import BANDED, batch, build

RUN = """
model = "gpt3-125m"
output = "runs/x"
data.train = [{ path = "data" }]
"""
CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(
    bool(missing_compiler("cpu")), reason="torch.compile needs a C++ compiler"
)


def loss_and_kept(model: GPT) -> tuple[float, list[torch.Size]]:
    """The loss, after a backward pass, and the shapes of what was kept for that pass."""
    kept: list[torch.Size] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.shape)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        loss = model(*batch(BANDED))
    loss.backward()
    return float(loss.detach()), kept


@pytest.mark.slow
@needs_compiler
def test_a_compiled_model_keeps_what_products_made_and_computes_gelu_again():
    model = build(BANDED)
    plain, _ = loss_and_kept(model)
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    compile_model(model, "model")
    found, kept = loss_and_kept(model)
    assert found == pytest.approx(plain, rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-4, atol=1e-6)
    # Of the feed-forward layer the 4 D wide input of GELU, not its output.
    wide = [shape for shape in kept if len(shape) > 1 and shape[-1] == BANDED.d_ff]
    activations = [s for s in wide if s.numel() == batch(BANDED)[0].numel() * BANDED.d_ff]
    assert len(activations) == BANDED.n_layer


@pytest.mark.slow
@needs_compiler
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_a_compiled_training_over_changing_micro_batches(tmp_path, name):
    # 8, 16, 24 and 32 sequences a step: micro-batches of 8, 8, 8 and 8 on one rank with 8, and on
    # two ranks of 4, 8, 4 (12 has no 8) and 8; each size is one more compilation, once.
    schedule = {"ramp_tokens": 4096, "total_tokens": 20 * 512}
    file = run_file(tmp_path, schedule=schedule, parallel={"micro_batch": 8, "ds_config": name})
    eager = trained(file, 2, f"output={tmp_path / 'eager'}", timeout_s=600)
    output = f"output={tmp_path / 'compiled'}"
    done = launch(file, 2, "parallel.compile=true", output, timeout_s=1000)
    assert done.returncode == 0, done.stderr
    assert "compile model" in done.stderr and "recompile" not in done.stderr
    compiled = steps(tmp_path / "compiled")
    assert len({r["batch_tokens"] for r in compiled}) == 4
    assert [r["digest"] for r in compiled] == [r["digest"] for r in eager]
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [r[key] for r in compiled] == pytest.approx([r[key] for r in eager], rel=tolerance)


def test_without_a_compiler_one_rank_warns_and_the_model_runs_on(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert missing_compiler("cpu") == "a C++ compiler (g++ or clang++)"
    config = parse_run(RUN, ["parallel.compile=true"])
    with caplog.at_level(logging.WARNING):
        for first in (True, False, False):
            choices = choose(config, Layout(), CPU, stage=1)
            apply(choices, first=first)
            assert choices.compile == "no"
    [record] = caplog.records
    assert "parallel.compile = true, but this host has not a C++ compiler" in record.getMessage()
    model = build(BANDED)
    compile_model(model, choices.compile)
    assert loss_and_kept(model)[0] > 0


def test_what_a_gpus_host_lacks_is_named(monkeypatch, tmp_path):
    """Triton compiles C when a kernel first runs: without a compiler a run would end there."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    ask = missing_for_triton.__wrapped__
    assert ask() == "the package triton"
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: "found")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask() == "a C compiler (gcc or clang)"
    monkeypatch.setenv("CC", "no-such-compiler")
    assert ask() == "a C compiler (no-such-compiler)"
    monkeypatch.setenv("CC", sys.executable)
    monkeypatch.setattr(sysconfig, "get_path", lambda *_: str(tmp_path))
    assert ask() == "Python.h (a package such as python3-dev)"
    (tmp_path / "Python.h").touch()
    assert ask() == ""


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_dynamo_that_is_switched_off_is_named(monkeypatch, device):
    """Else the log would say that blocks are compiled while torch passes over it."""
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert missing_compiler(device) == "Dynamo (TORCHDYNAMO_DISABLE=1 is set)"


def test_a_compiler_of_the_users_own(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert missing_compiler("cpu") == "a C++ compiler (no-such-compiler)"
    monkeypatch.setenv("CXX", shutil.which("true") or "")
    assert missing_compiler("cpu") == ""

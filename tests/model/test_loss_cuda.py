"""The loss's Triton kernel without a GPU: by Triton's own interpreter, against float64."""

import subprocess
import sys

import pytest
import torch

from megagpt.model.kernels.loss import loss_form

needs_triton = pytest.mark.skipif(
    loss_form("cuda", torch.bfloat16) != "triton", reason="Triton is not installed"
)

SOFTMAX = """
import torch
from megagpt.model.kernels.loss_cuda import softmax_gradient
generator = torch.Generator().manual_seed(0)
for dtype, rows, real, error in (
    (torch.float32, 64, 50, 1e-6),
    (torch.bfloat16, 5000, 4990, 2**-8),
    (torch.float16, 50304, 50257, 2**-11),
):
    logits = (3 * torch.randn(5, rows, generator=generator)).to(dtype)
    logits[0] *= 20
    logits[:, real:] = float("-inf")
    targets = torch.randint(0, real, (5,), generator=generator)
    targets[3] = -1
    exact = logits.double().softmax(1)
    exact[torch.arange(5), targets.clamp(min=0)] -= 1.0
    exact[3] = 0.0
    mass = logits.double().logsumexp(1)
    found = softmax_gradient(logits, targets)
    torch.testing.assert_close(found.double(), mass, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits.double(), exact, rtol=0, atol=error)
    assert not logits[:, real:].any() and not logits[3].any()
print("exact")
"""


@needs_triton
def test_tritons_kernel_by_its_interpreter_against_float64():
    run = subprocess.run(
        [sys.executable, "-c", SOFTMAX],
        env={"TRITON_INTERPRET": "1", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "exact\n", run.stderr

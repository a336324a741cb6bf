"""The device of the tests marked gpu: a GPU, or with DEVICE=cpu a CPU, where shapes shrink.

pytest -m gpu tests/gpu                  # on a machine with a GPU
DEVICE=cpu pytest -m gpu tests/gpu       # the same bodies, so that typing errors are found here
"""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """cuda or cpu; skips where there is no GPU and DEVICE does not ask for a CPU."""
    if os.environ.get("DEVICE") == "cpu":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield "cpu"
        return
    if not torch.cuda.is_available():
        pytest.skip("no GPU; DEVICE=cpu runs these tests on a CPU")
    yield "cuda"
    torch.cuda.empty_cache()

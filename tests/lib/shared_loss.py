"""The loss over a vocabulary that ranks share, against the plain one on each rank.

torchrun --nproc-per-node 3 -m tests.lib.shared_loss
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from megagpt.engine.tensor import TensorGroup, tensor_parts, vocabulary_loss

N, D = 24, 8
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def compare(group: TensorGroup, vocab: int, rows: int, dtype: torch.dtype, unscored: int) -> None:
    """Loss and both gradients; `rows` with padding, the first `unscored` targets negative."""
    draw = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(2, N // 2, D, generator=draw).to(dtype).requires_grad_()
    weight = torch.randn(rows, D, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (N,), generator=draw)
    targets[:unscored] = -100
    module = tensor_parts(group).embedding(rows, D, vocab)
    own = slice(module.first, module.first + module.weight.shape[0])
    with torch.no_grad():
        module.weight = torch.nn.Parameter(weight[own].detach().clone())
    kept: list[torch.dtype] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.extend([x.dtype] if x.shape == (N, rows // group.size) else [])
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        ours = vocabulary_loss(module, hidden, targets.view(2, -1))
    assert kept == [dtype], "logits are kept once, in their own dtype"
    got = torch.autograd.grad(3.0 * ours, [hidden, module.weight])
    exact = [hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()]
    logits = (exact[0].view(N, D) @ exact[1].t())[:, :vocab]
    plain = (
        F.cross_entropy(logits[unscored:], targets[unscored:])
        if unscored < N
        else 0.0 * logits.sum()
    )
    expected = torch.autograd.grad(3.0 * plain, exact)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    error = ERRORS[dtype]
    torch.testing.assert_close(ours.double(), plain, rtol=error, atol=error)
    for a, b in zip(got, (expected[0], expected[1][own]), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=error, atol=error)
    assert not got[1][max(vocab - module.first, 0) :].any(), "padding has a gradient"


def main() -> None:
    dist.init_process_group("gloo")
    group = TensorGroup(None, dist.get_rank(), dist.get_world_size())
    # Without padding, with some on the last rank, and with nothing else on it.
    for vocab, rows in ((30, 30), (25, 30), (17, 30)):
        for dtype in ERRORS:
            for unscored in (0, 5, N):
                compare(group, vocab, rows, dtype, unscored)
    torch.use_deterministic_algorithms(True)
    compare(group, 25, 30, torch.bfloat16, 5)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

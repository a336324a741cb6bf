"""Tensor parallel: the loss over a vocabulary that real ranks share."""

import sys

from tests.lib.distributed import free_port, run_together


def test_the_loss_over_a_shared_vocabulary_is_the_plain_one():
    place = ["--nproc-per-node=3", f"--master-port={free_port()}", "-m", "tests.lib.shared_loss"]
    done = run_together([sys.executable, "-m", "torch.distributed.run", *place])
    assert done.returncode == 0, done.stderr

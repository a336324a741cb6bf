"""What the optimizer is given once the ranks' gradients were added up: real processes, gloo."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.lib.corpus import run_file
from tests.lib.distributed import free_port, run_together

Result = tuple[float, float, float, dict[str, torch.Tensor]]
"""(loss, gradient norm, evaluated loss, gradients)"""


def one_step(root: Path, ranks: int, layouts: list[list], **sections: dict) -> list[Result]:
    """The results of tests.lib.one_step on so many ranks."""
    out = root / f"{ranks}-{len(list(root.iterdir()))}"
    out.mkdir()
    # 24 sequences: any number of ranks here shares the full batch.
    file = run_file(root, schedule={"batch_tokens": 768}, **sections)
    place = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    port = f"--master-port={free_port()}"
    script = ["-m", "tests.lib.one_step", str(file), str(out), json.dumps(layouts)]
    done = run_together([sys.executable, *place, port, *script], timeout_s=600)
    assert done.returncode == 0, done.stderr
    return [torch.load(out / f"{index}.pt") for index in range(len(layouts))]


def not_bf16(gradients: dict[str, torch.Tensor]) -> float:
    """Share of the values that bf16 cannot hold."""
    values = torch.cat(list(gradients.values()))
    return float((values != values.bfloat16().float()).float().mean())


def furthest(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of a value, relative to the largest value of its parameter."""
    assert found.keys() == expected.keys()
    return max(
        float((found[name] - expected[name]).abs().max() / expected[name].abs().max())
        for name in expected
    )


BF16 = {"dtype": "bf16"}
ROUNDING = 2**-9
"""Half the distance of bf16 numbers, relative: what a reduction in bf16 would cost."""


def slow(*values: object) -> object:
    """A case that is run by hand."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "layouts"),
    [
        slow(1, [["zero1", 1, 1, 24, 2]]),
        (2, [["zero1", 1, 1, 24, 2], ["zero2", 1, 1, 24, 2], ["zero3", 1, 1, 24, 2]]),
        # A mean over three ranks is no shift of the exponent.
        slow(3, [["zero1", 1, 1, 24, 2], ["zero2", 1, 1, 24, 2], ["zero3", 1, 1, 24, 2]]),
        (2, [["pipeline", 2, 1, 24, 2]]),
        slow(4, [["pipeline", 2, 1, 24, 2]]),
        slow(2, [["pipeline", 1, 2, 24, 2]]),
    ],
)
def test_gradients_keep_their_fp32_bits_through_the_reduction(tmp_path, ranks, layouts):
    results = one_step(tmp_path, ranks, layouts, parallel=BF16)
    for (name, *_), (_, _, _, found) in zip(layouts, results, strict=True):
        assert not_bf16(found) > 0.5, name
    first = results[0][3]
    for (name, *_), (_, _, _, found) in zip(layouts, results, strict=True):
        assert furthest(found, first) < ROUNDING / 100, name


@pytest.mark.timeout(900)
def test_gradients_are_added_up_at_once_bit_for_bit(tmp_path):
    # Each micro-batch's bf16 gradient is added to the fp32 sum and freed as it comes.
    from megagpt.plan.ds_config import read_ds_config

    late = read_ds_config("zero1")
    assert late["bf16"].pop("immediate_grad_update") is True
    path = tmp_path / "late.json"
    path.write_text(json.dumps(late))
    layouts = [["zero1", 1, 1, 24, 2], [str(path), 1, 1, 24, 2]]
    at_once, at_the_end = one_step(tmp_path, 2, layouts, parallel=BF16)
    assert at_once[:3] == at_the_end[:3]
    assert all(torch.equal(at_once[3][name], value) for name, value in at_the_end[3].items())


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("ranks", "sequences", "layouts"),
    [
        # Six sequences on four data ranks: three micro-batches of two, and one that weighs nothing.
        (4, 6, [[f"zero{stage}", 1, 1, 6, 2] for stage in range(4)]),
        # On two data ranks of two stages the last pass has one micro-batch for two.
        slow(4, 6, [["pipeline", 2, 1, 6, 2]]),
        # Five on three ranks: each is a micro-batch, and the sixth pass is idle.
        slow(3, 5, [["zero3", 1, 1, 5, 1]]),
    ],
)
def test_ranks_without_samples_weigh_nothing(tmp_path, ranks, sequences, layouts):
    alone = [["zero1", 1, 1, sequences, 1]]
    [(loss, norm, evaluated, gradients)] = one_step(tmp_path, 1, alone)
    for (name, *_), found in zip(layouts, one_step(tmp_path, ranks, layouts), strict=True):
        assert found[0] == pytest.approx(loss, rel=1e-6), name
        assert found[1] == pytest.approx(norm, rel=1e-5), name
        assert found[2] == pytest.approx(evaluated, rel=1e-6), name
        assert furthest(found[3], gradients) < 1e-5, name

"""Every layout trains to the same losses as one process: real DeepSpeed processes over gloo.

The miniature has a ramp that changes the batch three times, clipping, weight decay, tied
embeddings and banded layers. Catches again, should a newer DeepSpeed bring them back: the
accumulation boundary that a ramp moves (ZeRO 0-3), a norm over the first stage only, a tied
weight's gradient counted twice or lost, replicas counted on each tensor rank.
"""

import pytest

from megagpt.check.parity import NAMES, differences, launch
from megagpt.cli import main
from megagpt.errors import DamageError, MegagptError
from tests.lib.corpus import run_file


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return str(run_file(tmp_path_factory.mktemp("parity")))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_layout_is_the_single_process(file, capsys):
    code = main(["parity", file, "model.dropout=0.1"])
    table = capsys.readouterr().out
    assert code == 0, table
    assert all(name in table for name in NAMES)
    rows = [line.split()[-2:] for line in table.splitlines() if line.startswith(tuple(NAMES))]
    assert len(rows) == len(NAMES)
    assert all(float(loss) <= 1e-5 and float(norm) <= 1e-5 for loss, norm in rows), table


@pytest.mark.timeout(600)
@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_recompute(file, capsys, dtype):
    # A CPU without products in bf16 takes minutes for them.
    layouts = ["--only", "PP2", "--only", "ZeRO-3 x2"]
    code = main(["parity", file, "parallel.recompute=full", "--dtype", dtype, *layouts])
    assert code == 0, capsys.readouterr().out


def test_wrong_usage_and_failures(file, capsys):
    assert main(["parity", file, "--only", "ZeRO-9"]) == 2
    assert "--only 'ZeRO-9': must be one of ZeRO-0 x2" in capsys.readouterr().err
    with pytest.raises(MegagptError, match="training on 1 ranks ended with 7"):
        launch(["-c", "import sys; sys.exit(7)"], 1)
    with pytest.raises(DamageError, match="training on 1 ranks ended with 3:\n.*what is damaged"):
        launch(["-c", "import sys; print('what is damaged', file=sys.stderr); sys.exit(3)"], 1)
    step = {"step": 1, "tokens": 2, "lr": 0.1, "digest": "a", "loss": 1.0, "grad_norm": 1.0}
    with pytest.raises(MegagptError, match="did not take the same steps over the same samples"):
        differences([step], [{**step, "digest": "b"}])
    assert differences([step], [{**step, "loss": 1.5}]) == (0.5, 0.0)

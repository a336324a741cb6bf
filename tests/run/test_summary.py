"""What a finished run says of itself, also when its record has lost lines."""

import json
import re

from megagpt.config import load_run
from megagpt.run.folder import summary
from tests.lib.corpus import run_file
from tests.lib.distributed import group_of_one
from tests.lib.here import train_here

SHORT: dict[str, dict[str, object]] = {
    "schedule": {"total_tokens": 4 * 256, "warmup_tokens": 0, "batch_tokens": 256}
    | {"ramp_start_tokens": 0, "ramp_tokens": 0},
    "checkpoint": {"every_tokens": 0},
    "evaluate": {"every_tokens": 2 * 256, "batches": 1},
    "log": {"tensorboard": False, "every_steps": 1_000_000},
}
"""Four steps, evaluated at 0, 2 and 4."""


def test_lost_lines_make_no_other_run_of_it(tmp_path):
    file = run_file(tmp_path, **SHORT)
    with group_of_one():
        train_here(file)
    path, config = tmp_path / "run" / "metrics.jsonl", load_run(file)
    lines = path.read_text().splitlines(keepends=True)
    losses = {
        record["step"]: f"{record['validation_loss']:.4f}"
        for record in map(json.loads, lines)
        if "validation_loss" in record
    }
    assert list(losses) == [0, 2, 4]

    def told(*lost: int) -> list[str]:
        """What is said of the loss once the lines of these steps are gone."""
        kept = [line for line in lines if json.loads(line).get("step") not in lost]
        assert len(kept) < len(lines) or not lost
        path.write_text("".join(kept))
        said = summary(config)
        assert said.startswith("run complete: 1,024 tokens in 4 steps, ")
        return re.findall("validation loss: (.*)", said)

    assert told() == [f"{losses[0]} before, {losses[4]} after"]
    assert told(0) == [f"{losses[4]} after"]
    assert told(4) == [f"{losses[0]} before"]
    assert told(0, 4) == []
    # Asked for less than was trained, the rate of what was trained is told.
    smaller = load_run(file, ["schedule.total_tokens=512"])
    assert "set schedule.decay_tokens = 1024 to keep the learning rate low" in summary(smaller)

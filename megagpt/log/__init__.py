"""The record of a run: metrics.jsonl, TensorBoard and the console, written by rank 0 alone (L1).

    log = RunLog(folder, total_tokens=..., resume_tokens=0, resume_step=0, writer=rank == 0)
    log.step({"step": 1, "tokens": 8192, "loss": 9.2, ...})
    log.close()

The same records go everywhere, under the same names, with tokens consumed as the axis. After a
crash the record is cut back to the step where training goes on: one curve, no step twice.
"""

from megagpt.log.metrics import read_metrics
from megagpt.log.run import RunLog

__all__ = ["RunLog", "read_metrics"]

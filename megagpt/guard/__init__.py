"""What goes wrong in a long training, one file each: found, told, survived where it can be (L2).

    stop.py      signals and time limits        -> a joint save, exit code 75
    watchdog.py  hangs, and a launcher that died -> stacks in the run folder, the job ends
    spike.py     loss and gradient spikes        -> told, the update left out, or rolled back
    journal.py   what was skipped for a spike    -> a resumed run skips it too
    replicas.py  weights that should be equal    -> the rank that differs is named

The table of docs/faults.md says which key governs what.
"""

from megagpt.guard.journal import Journal
from megagpt.guard.replicas import check_replicas
from megagpt.guard.spike import Recent
from megagpt.guard.stop import StopRequest
from megagpt.guard.watchdog import Watchdog

__all__ = ["Journal", "Recent", "StopRequest", "Watchdog", "check_replicas"]

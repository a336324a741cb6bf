"""A look inside a few steps: where their time goes, operation by operation (L1: torch).

    profile = Profile(folder, first_step=20, last_step=25, rank=rank)
    for step in ...:
        profile.begin(step)
        train_step()
        table = profile.end(step)       # text after the last profiled step, None otherwise

Each rank writes RUN_DIR/profile/steps_20_25_rank_0.pt.trace.json.gz, which Perfetto
(https://ui.perfetto.dev) and chrome://tracing open, and the table beside it as text. Steps are
profiled between the two calls only, so that a run pays for nothing else.
"""

from pathlib import Path
from typing import Any

from megagpt.files import write_file

_ROWS = 10


class Profile:
    """Profiles the steps first_step to last_step, both included and counted from 1; none where the
    last is before the first."""

    def __init__(self, folder: Path, *, first_step: int, last_step: int, rank: int = 0) -> None:
        self.first_step, self.last_step = first_step, last_step
        name = f"steps_{first_step}_{last_step}_rank_{rank}"
        self.trace = folder / "profile" / f"{name}.pt.trace.json.gz"
        self._profiler: Any = None

    def begin(self, step: int) -> None:
        """Call before step number `step`. A run that resumes inside the range profiles its rest."""
        if self._profiler is None and self.first_step <= step <= self.last_step:
            import torch
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, record_shapes=True, profile_memory=True)
            self._profiler.start()

    def end(self, step: int) -> str | None:
        """Call after step number `step`; the table after the last one, None otherwise."""
        return self.close() if step >= self.last_step else None

    def close(self) -> str | None:
        """Ends the profile where the run ends; the table, None where no step was profiled."""
        if self._profiler is None:
            return None
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        self.trace.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.trace))
        table = costliest(profiler)
        write_file(self.trace.with_name(self.trace.name.split(".")[0] + ".txt"), table)
        return table


def costliest(profiler: Any) -> str:
    """The ten costliest operations: share of the time, milliseconds, calls; by time on the GPU
    where there is one, else on the CPU, without what an operation spends in others."""
    import torch

    key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    rows = sorted(profiler.key_averages(), key=lambda row: getattr(row, key), reverse=True)
    total = sum(getattr(row, key) for row in rows) or 1
    width = max((len(row.key) for row in rows[:_ROWS]), default=9)
    lines = [f"{'operation':<{width}}  share        ms   calls"]
    for row in rows[:_ROWS]:
        spent = getattr(row, key)
        lines.append(
            f"{row.key:<{width}}  {spent / total:5.1%}  {spent / 1e3:8.2f}  {row.count:6d}"
        )
    return "\n".join(lines) + "\n"

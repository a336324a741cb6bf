"""What the picture and the page share: colours, and over how many steps a curve is averaged."""

from megagpt.report.series import Run

INK, FAINT, GRID, GREY = "#1f2933", "#66727f", "#e6e9ed", "#8a94a0"
TRAIN, VALIDATION, RATE, BATCH, ALARM = "#2b6cb0", "#dd6b20", "#2f855a", "#6b46c1", "#c53030"
COLOURS = (TRAIN, VALIDATION, RATE, BATCH, ALARM, "#0987a0", "#b7791f", "#4a5568")


def window(run: Run) -> int:
    """Steps over which the curve of the training loss is averaged."""
    n_steps = len(run.steps)
    return min(100, max(5, n_steps // 60)) if n_steps >= 24 else 1

"""Fits megagpt/plan/constants.json to published measurements, and tells how far off it is.

    python benchmarks/planner/fit.py [--check] [--write]

A constant is fitted on the logarithm of measured step time with a loss that outliers cannot pull,
and drawn towards a likely value (PRIORS, PARENTS), so that one that no row speaks about keeps a
sensible value. Those of slow_ring and data_exposed were set after a look at these rows. --check
adds ten-fold cross-validation and leaves every source out once; --write writes the constants and
the intervals that those errors give (implies --check). Needs scipy, which megagpt itself does not.
"""

import argparse
import csv
import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from megagpt.plan.constants import CONSTANTS, PATH, interval
from megagpt.plan.cost import step_time
from megagpt.plan.device_memory import fullest
from megagpt.plan.jobs import SYSTEMS, Column, Jobs, jobs_from_rows, read_rows

Names = np.ndarray[tuple[int], np.dtype[np.str_]]

HERE = Path(__file__).parent
ERRORS = HERE / "errors.csv"
DOCS = HERE.parents[1] / "docs" / "how-to" / "planner.md"
NOISE = 0.05
"""Relative error of a measurement that is taken for noise; above it a row counts linearly."""

# Kind -> value before any row is seen, and its standard deviation as a logarithm.
PRIORS: dict[str, tuple[float, float]] = {
    "matmul.V100": (0.6, 0.2), "matmul.A100": (0.75, 0.2), "matmul.H100": (0.65, 0.2),
    "matmul.B200": (0.6, 0.1), "flash.V100": (0.5, 0.2), "flash.A100": (0.7, 0.4),
    "flash.H100": (0.6, 0.4), "flash.B200": (0.5, 0.2), "fp8": (1.6, 0.2),
    "misaligned": (0.25, 0.3), "last_round": (0.3, 0.7), "operands": (1.0, 0.5),
    "scores_matmul": (0.5, 0.4), "scores_passes": (6.0, 0.4), "narrow_head": (16.0, 0.6),
    "odd_head": (2.0, 0.7), "element": (2.5, 0.4), "loss_passes": (4.0, 0.5),
    "pressure": (1.0, 0.7), "launch_tensor": (0.5, 0.5), "nvlink_tensor": (0.6, 0.3),
    "nvlink_data": (0.6, 0.3), "tensor_latency": (3e-5, 0.7), "network": (0.7, 0.4),
    "slow_network": (0.2, 0.5), "slow_ring": (0.5, 1.2), "slow_latency": (5.0, 1.0),
    "update": (1.5, 0.5), "straggler.V100": (0.005, 0.5), "straggler.A100": (0.005, 0.7),
    "straggler.H100": (0.005, 0.7), "straggler.B200": (0.005, 0.5), "framework": (1.0, 0.05),
    "fusion": (1.0, 0.3), "launch": (8e-4, 0.5), "step": (1e-2, 0.7), "data_exposed": (0.8, 0.2),
    "tensor_exposed": (0.8, 0.4), "pipeline_exposed": (0.7, 0.5), "pipeline_latency": (1e-3, 1.0),
    "ring_latency": (1e-5, 1.0), "overlap": (1.0, 0.7), "sharded_latency": (1e-5, 1.0),
}  # fmt: skip
# System -> whose constants it is drawn towards (itself where it starts a line of its own).
PARENTS = {
    "megatron-lm": "", "megatron-deepspeed": "megatron-lm", "gpt-neox": "megatron-deepspeed",
    "megatron-core": "megatron-lm", "nanotron": "megatron-core", "deepspeed-2021": "",
    "deepspeed-zero3": "deepspeed-2021", "fsdp": "", "pax": "fsdp", "ddp": "fsdp",
}  # fmt: skip
# Kind -> how far systems differ, and the systems that rows can tell apart in it.
BY_SYSTEM: dict[str, tuple[float, tuple[str, ...]]] = {
    "framework": (0.12, tuple(PARENTS)),
    "fusion": (0.3, tuple(PARENTS)),
    "launch": (0.6, tuple(PARENTS)),
    "step": (0.8, tuple(PARENTS)),
    # A share: with more freedom the slow ring of one cluster would make it 1.5.
    "data_exposed": (0.15, ("megatron-lm", "megatron-deepspeed", "megatron-core", "nanotron",
                           "fsdp", "ddp")),
    "tensor_exposed": (0.4, ("megatron-lm", "megatron-deepspeed", "megatron-core", "nanotron")),
    "pipeline_exposed": (0.5, ("megatron-lm", "megatron-deepspeed", "megatron-core", "nanotron")),
    "pipeline_latency": (1.0, ("megatron-lm", "megatron-deepspeed", "megatron-core", "nanotron")),
    "ring_latency": (1.0, ("nanotron",)),
    "overlap": (0.7, ("deepspeed-2021", "deepspeed-zero3", "fsdp", "pax")),
    "sharded_latency": (1.0, ("deepspeed-2021", "deepspeed-zero3", "fsdp", "pax")),
    "fp8": (0.15, ("megatron-core", "fsdp", "pax")),
}  # fmt: skip
MEMORY: dict[str, tuple[float, float]] = {
    "activations": (1.0, 0.3),
    "logits": (8.0, 0.5),
    "overhead": (6.0, 0.2),
    "overhead.megatron-deepspeed": (1.0, 0.4),
    "overhead.nanotron": (1.0, 0.4),
    "overhead.fsdp": (1.0, 0.4),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rows with their outcome."""

    jobs: Jobs
    value: Column
    source: Names
    row_id: Names

    def only(self, chosen: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> "Measured":
        columns = {name: getattr(self.jobs, name)[chosen] for name in Jobs.__dataclass_fields__}
        return Measured(
            Jobs(**columns), self.value[chosen], self.source[chosen], self.row_id[chosen]
        )


@dataclasses.dataclass(frozen=True)
class Fit:
    """What is fitted: names and priors of the logarithms, and what they predict."""

    names: list[str]
    mean: Column
    deviation: Column
    predict: Callable[[Jobs, Mapping[str, float]], Column]

    def constants(self, x: Column) -> dict[str, float]:
        """Constants by name; one of a system is its parent's times a factor of its own."""
        factors = dict(zip(self.names, np.exp(x), strict=True))
        found = {name: v for name, v in factors.items() if not _of_system(name)}
        for name in self.names:
            if _of_system(name):
                found[name] = _product(name, factors)
        return {name: float(v) for name, v in found.items()}

    def run(self, rows: Measured, start: Column | None = None, rounds: int = 25) -> Column:
        """The most probable logarithms for these rows."""

        def residuals(x: Column) -> Column:
            off = np.log(self.predict(rows.jobs, self.constants(x)) / rows.value) / NOISE
            gentle = np.sign(off) * 2 * np.sqrt(np.sqrt(1 + off * off / 4) - 1)
            return np.concatenate([gentle, (x - self.mean) / self.deviation])

        from scipy.optimize import least_squares

        x0 = self.mean if start is None else start
        return least_squares(residuals, x0, x_scale=self.deviation, max_nfev=rounds).x

    def errors(self, rows: Measured, x: Column) -> Column:
        """log(predicted / measured)."""
        return np.log(self.predict(rows.jobs, self.constants(x)) / rows.value)


def _of_system(name: str) -> bool:
    return name.partition(".")[2] in PARENTS


def _product(name: str, factors: Mapping[str, float]) -> float:
    kind, _, system = name.partition(".")
    value = factors[kind]
    while system:
        value *= factors.get(f"{kind}.{system}", 1.0)
        system = PARENTS[system]
    return value


def time_fit() -> Fit:
    """The fit of step time."""
    priors = dict(PRIORS)
    for kind, (spread, systems) in BY_SYSTEM.items():
        priors |= {f"{kind}.{system}": (1.0, spread) for system in systems}
    return _fit(priors, step_time)


def memory_fit() -> Fit:
    """The fit of peak memory, in GB."""
    return _fit(MEMORY, lambda jobs, c: np.asarray(sum(fullest(jobs, c).values())) / 1e9)


def _fit(priors: Mapping[str, tuple[float, float]], predict: Callable[..., Column]) -> Fit:
    mean = np.log([value for value, _ in priors.values()])
    return Fit(list(priors), mean, np.array([d for _, d in priors.values()]), predict)


def rows_of(column: str) -> Measured:
    """Rows that are good for fitting and have this outcome."""
    rows = read_rows(HERE / "published.csv")
    rows = [row for row in rows if row["eval_use"] == "1" and row[column]]
    return Measured(
        jobs_from_rows(rows, "published.csv"),
        np.array([float(row[column]) for row in rows]),
        np.array([row["source"] for row in rows]),
        np.array([row["row_id"] for row in rows]),
    )


def left_out(fit: Fit, rows: Measured, groups: Column, start: Column) -> Column:
    """Errors of each row by a fit that has not seen its group."""
    found = np.zeros(len(rows.value))
    for group in np.unique(groups):
        inside = groups == group
        # The whole fit's optimum is near: forty rounds change hardly any error.
        x = fit.run(rows.only(~inside), start, 6)
        found[inside] = fit.errors(rows.only(inside), x)
    return found


def folds(rows: Measured, n: int = 10) -> Column:
    """Each row's fold, the same in every run."""
    return np.random.default_rng(0).permutation(len(rows.value)) % n


def told(errors: Column) -> str:
    """Median and 90th percentile of the relative error."""
    share = np.abs(np.expm1(errors))
    return f"{np.median(share):.1%} | {np.quantile(share, 0.9):.1%}"


def table(rows: Measured, columns: Mapping[str, Column]) -> str:
    """Errors by source as Markdown: median and 90th percentile."""
    lines = ["| source | rows |" + "".join(f" {c}: median | p90 |" for c in columns)]
    lines.append("|---|---|" + "---|---|" * len(columns))
    for source in ["all", *sorted(set(rows.source))]:
        chosen = (rows.source == source) | (source == "all")
        cells = "".join(f" {told(e[chosen])} |" for e in columns.values())
        lines.append(f"| {source} | {chosen.sum()} |{cells}")
    return "\n".join(lines)


OUTCOMES = {"time": "step_time_s", "memory": "memory_gb"}
KINDS = ("fit", "cross-validation", "source left out")


def main() -> None:
    """Fits, checks and writes; prints tables for docs/how-to/planner.md."""
    made = argparse.ArgumentParser(description=__doc__)
    made.add_argument("--check", action="store_true", help="cross-validation, sources left out")
    made.add_argument("--write", action="store_true", help="write constants.json and errors.csv")
    args = made.parse_args()
    constants: dict[str, float] = {}
    intervals: dict[str, dict[str, list[float]]] = {}
    errors: dict[str, dict[str, Column]] = {}
    for name, fit in (("time", time_fit()), ("memory", memory_fit())):
        rows = rows_of(OUTCOMES[name])
        x = fit.run(rows)
        constants |= fit.constants(x)
        found = fit.errors(rows, x)
        print(f"\n{name}: {len(rows.value)} rows, {len(fit.names)} constants; fit {told(found)}")
        if args.check or args.write:
            parts = left_out(fit, rows, folds(rows), x), left_out(fit, rows, rows.source, x)
            errors[name] = dict(zip(KINDS, (found, *parts), strict=True))
            intervals[name] = spread(rows, errors[name])
            print("\n".join(report(rows, errors[name])))
    if args.write:
        tree = json.loads(PATH.read_text())
        tree["constants"] = {k: float(f"{v:.4g}") for k, v in sorted(constants.items())}
        tree["intervals"] = intervals
        tree["sources"] = {name: sorted(set(rows_of(OUTCOMES[name]).source)) for name in OUTCOMES}
        PATH.write_text(json.dumps(tree, indent=1) + "\n")
        write_errors(errors)
        write_docs()


def report(rows: Measured, errors: Mapping[str, Column]) -> list[str]:
    """What planner.md tells of one outcome: the table, and coverage and order behind it."""
    order = {k: pair_order(rows.jobs, rows.value, np.exp(e)) for k, e in errors.items()}
    return [
        table(rows, errors),
        f"coverage of 80% intervals: {coverage(rows, errors):.1%}",
        coverage_of_sources(rows, errors),
        "pairs in the right order: " + ", ".join(f"{k} {v:.0%}" for k, v in order.items()),
    ]


def write_errors(errors: Mapping[str, Mapping[str, Column]]) -> None:
    """errors.csv: log(predicted / measured) of every row, by each kind of fit."""
    lines = ["outcome,row_id," + ",".join(KINDS)]
    for name, columns in errors.items():
        for i, row_id in enumerate(rows_of(OUTCOMES[name]).row_id):
            values = ",".join(f"{columns[kind][i]:.5f}" for kind in KINDS)
            lines.append(f"{name},{row_id},{values}")
    ERRORS.write_text("\n".join(lines) + "\n")


def write_docs() -> None:
    """The three tables of planner.md anew, from errors.csv; prints what stands behind them."""
    made = {name: report(rows_of(OUTCOMES[name]), read_errors(name)) for name in OUTCOMES}
    found = [made["time"][0], unseen(), made["memory"][0]]
    tables = iter(table + "\n" for table in found)
    head = r"\| (source \| rows|not in the fit) \|.*\n(\|.*\n)+"
    text = re.sub(head, lambda _: next(tables), DOCS.read_text())
    DOCS.write_text(text)
    print("\n".join(f"{name}: {line}" for name, lines in made.items() for line in lines[1:]))


def unseen() -> str:
    """Steps published elsewhere that were never fitted, beside their prediction, as Markdown."""
    rows = read_rows(HERE / "unseen.csv")
    jobs = jobs_from_rows(rows, "unseen.csv")
    seconds = step_time(jobs, CONSTANTS)
    low, high = interval(jobs, "time", [row["source"] for row in rows])
    lines = ["| not in the fit | source | step: measured | predicted | |", "|---|---|---|---|---|"]
    for row, found, less, more in zip(rows, seconds, seconds * low, seconds * high, strict=True):
        step = float(row["step_time_s"])
        outside = "" if less <= step <= more else ", outside its interval"
        told = f"{step:.3g} s | {found:.3g} s | {found / step - 1:+.0%}{outside} |"
        lines.append(f"| {row['row_id']} | {row['source']} | {told}")
    return "\n".join(lines)


def read_errors(name: str) -> dict[str, Column]:
    """The columns of errors.csv for time or memory."""
    with ERRORS.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["outcome"] == name]
    return {kind: np.array([float(row[kind]) for row in rows]) for kind in KINDS}


def spread(rows: Measured, columns: Mapping[str, Column]) -> dict[str, list[float]]:
    """80% of measurements lie within [low, high] x predicted, by system; "other": by sources that
    the fit had not seen."""
    near, far = columns["cross-validation"], columns["source left out"]
    found = {"other": new_source(far, rows.source)}
    for index in sorted(set(rows.jobs.framework)):
        found[SYSTEMS[index]] = _bounds(near[rows.jobs.framework == index], near)
    return found


def _bounds(errors: Column, everyone: Column) -> list[float]:
    """The middle 80% of measured / predicted, drawn towards everyone's where rows are few."""
    share = len(errors) / (len(errors) + 20)

    def ends_of(values: Column) -> Column:
        # As much more as few rows need for their quantile to hold for the next one.
        edge = 0.1 * max(0.0, 1 - 9 / len(values))
        return np.quantile(-values, (edge, 1 - edge))

    ends = share * ends_of(errors) + (1 - share) * ends_of(everyone)
    return [float(f"{np.exp(end):.4g}") for end in ends]


def new_source(errors: Column, source: Names) -> list[float]:
    """The middle 80% of measured / predicted for a source that no fit has seen.

    Each source counts once, however many rows it has, and the next one may lie anywhere between
    them or beyond all (conformal prediction for groups: Dunn, Wasserman and Ramdas 2022). Fewer
    than ten sources cannot tell; then every row counts.
    """
    names, index, rows = np.unique(source, return_inverse=True, return_counts=True)
    beyond = 0.1 * (len(names) + 1) - 1
    if beyond <= 0:
        return _bounds(errors, errors)
    ends = []
    for values in (-errors, errors):
        order = np.argsort(values)
        ends.append(values[order][np.searchsorted(np.cumsum(1 / rows[index][order]), beyond)])
    return [float(f"{np.exp(end):.4g}") for end in (ends[0], -ends[1])]


def pair_order(jobs: Jobs, measured: Column, ratio: Column) -> float:
    """Share of pairs of layouts of one model on as many devices of one kind, with one batch, that
    the prediction puts in the measured order; `ratio` is predicted / measured. Pairs that differ
    by less than 2%, and one layout measured twice, do not count. NaN where there are none."""
    same = ("layers", "width", "heads", "seq", "batch", "gpus", "gpu", "framework", "fp8")
    every = np.array([getattr(jobs, name) for name in Jobs.__dataclass_fields__], dtype=float).T
    keys = np.array([getattr(jobs, name) for name in same], dtype=float).T
    right: list[bool] = []
    for i in range(len(jobs)):
        for k in range(i):
            apart = np.log(measured[i] / measured[k])
            layouts = (keys[i] == keys[k]).all() and (every[i] != every[k]).any()
            if layouts and abs(apart) > 0.02:
                right.append(bool((apart + np.log(ratio[i] / ratio[k])) * apart > 0))
    return float(np.mean(right)) if right else float("nan")


def coverage(rows: Measured, columns: Mapping[str, Column]) -> float:
    """Share of rows inside intervals that come from the other folds alone."""
    near, inside, fold = columns["cross-validation"], [], folds(rows)
    for row in range(len(near)):
        others = fold != fold[row]
        same = others & (rows.jobs.framework == rows.jobs.framework[row])
        low, high = _bounds(near[same], near[others]) if same.any() else (0.0, np.inf)
        inside.append(low <= np.exp(-near[row]) <= high)
    return float(np.mean(inside))


def coverage_of_sources(rows: Measured, columns: Mapping[str, Column]) -> str:
    """Share of rows inside the interval of new sources when their own source had no say in it."""
    near, far = columns["cross-validation"], columns["source left out"]
    inside, names = np.zeros(len(far)), sorted(set(rows.source))
    for name in names:
        out = rows.source == name
        low, high = new_source(far[~out], rows.source[~out])
        for row in np.flatnonzero(out):
            same = (rows.jobs.framework == rows.jobs.framework[row]) & ~out
            own = _bounds(near[same], near[~out]) if same.any() else (low, high)
            inside[row] = min(low, own[0]) <= np.exp(-far[row]) <= max(high, own[1])
    each = np.mean([inside[rows.source == name].mean() for name in names])
    return f"of sources left out: {np.mean(inside):.1%} of rows, {each:.1%} of sources' in the mean"


if __name__ == "__main__":
    main()

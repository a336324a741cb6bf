"""planner.md tells what the fit's own record says, and the record is that of the constants."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

from megagpt.plan.constants import CONSTANTS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "planner" / "fit.py"
DOCS = (ROOT / "docs" / "how-to" / "planner.md").read_text()


@pytest.fixture(scope="module")
def fitting():
    spec = importlib.util.spec_from_file_location("fit", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses looks for the module of a class.
    import sys

    sys.modules["fit"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fit"]


@pytest.mark.parametrize("name", ["time", "memory"])
def test_docs_tell_what_the_record_says(fitting, name):
    rows, errors = fitting.rows_of(fitting.OUTCOMES[name]), fitting.read_errors(name)
    table, covered, of_sources, order = fitting.report(rows, errors)
    for line in table.splitlines():
        assert line in DOCS
    percent = covered.rpartition(" ")[2]
    told = re.search(r"cover ([\d.]+%) of left-out step times and ([\d.]+%) of left-out", DOCS)
    assert told is not None and told[1 if name == "time" else 2] == percent
    rows_in, sources_in = re.findall(r"[\d.]+%", of_sources)
    if name == "memory":
        assert f"it covers {rows_in} of the rows and neither of torchtitan's." in DOCS
    if name == "time":
        of_time = (
            f"covers\n{rows_in} of the step times of sources left out, {sources_in} of a source's"
        )
        assert of_time in DOCS
        # What 80% means, for rows of known sources and of new ones.
        assert 75 < float(rows_in[:-1]) < 85 and 75 < float(sources_in[:-1]) < 85
        crossed = re.search(r"(\d+%) are put in the right order", DOCS)
        fitted = re.search(r"(\d+%) by the\nfit itself", DOCS)
        assert crossed is not None and f"cross-validation {crossed[1]}" in order
        assert fitted is not None and f"fit {fitted[1]}" in order


@pytest.mark.parametrize("name", ["time", "memory"])
def test_the_record_is_that_of_the_constants(fitting, name):
    rows, errors = fitting.rows_of(fitting.OUTCOMES[name]), fitting.read_errors(name)
    fit = fitting.time_fit() if name == "time" else fitting.memory_fit()
    now = np.log(fit.predict(rows.jobs, CONSTANTS) / rows.value)
    # Constants are written with four digits.
    assert np.abs(now - errors["fit"]).max() < 0.005
    found = fitting.spread(rows, errors)
    from megagpt.plan.constants import interval

    for index, system in enumerate(fitting.SYSTEMS):
        chosen = rows.jobs.framework == index
        if chosen.any():
            low, high = interval(rows.jobs, name)
            ends = low[chosen][0], high[chosen][0]
            assert ends == pytest.approx(found[system], rel=1e-3)


def test_docs_tell_how_far_off_rows_are_that_were_never_fitted(fitting):
    table = fitting.unseen()
    assert table in DOCS and len(table.splitlines()) == 2 + 16
    told = re.search(r"(\d+) of 16 lie in their 80% interval", DOCS)
    assert told is not None and int(told[1]) == 16 - table.count("outside its interval")
    off = [abs(float(re.search(r"([+-]\d+)%", line)[1])) for line in table.splitlines()[2:]]
    told = re.search(r"median error of these 16 is (\d+)%", DOCS)
    assert told is not None and float(told[1]) == pytest.approx(np.median(off), abs=0.6)


def test_a_new_source_may_lie_beyond_all_others(fitting):
    # Nineteen sources of one row and one of a thousand: each counts once, and so does the next.
    errors, source = np.arange(19) / 100, np.array([f"s{n}" for n in range(19)])
    low, high = fitting.new_source(
        np.append(errors, np.full(1000, 0.5)), np.append(source, ["many"] * 1000)
    )
    # 10% of 21 sources are 2.1, of which the next is one: the second from each end.
    assert np.log([low, high]) == pytest.approx([-0.18, -0.01], abs=1e-3)
    few = fitting.new_source(errors[:9], source[:9])
    assert few == fitting._bounds(errors[:9], errors[:9])


def test_order_of_pairs(fitting):
    row = {
        **{"n_layers": "48", "d_model": "8192", "n_heads": "64", "seq_len": "2048"},
        **{"global_batch_seqs": "1536", "n_gpus": "512", "tp": "8", "pp": "2", "micro_batch": "1"},
    }
    more = [row | {"micro_batch": "2"}, row | {"n_gpus": "1024"}, row]
    three, seconds = fitting.jobs_from_rows([row, *more]), np.array([30.0, 33.0, 60.0, 40.0])
    # The last is the first measured again: with it alone there is no pair.
    assert fitting.pair_order(three, seconds, np.ones(4)) == 1.0
    assert fitting.pair_order(three, seconds, np.array([1.2, 1.0, 1.0, 1.0])) == 0.5
    twice = fitting.jobs_from_rows([row, row])
    assert np.isnan(fitting.pair_order(twice, np.array([30.0, 40.0]), np.ones(2)))
    near = fitting.jobs_from_rows([row, more[0]])
    assert np.isnan(fitting.pair_order(near, np.array([30.0, 30.1]), np.ones(2)))


@pytest.mark.slow
def test_a_fold_that_is_left_out_again_has_the_same_errors(fitting):
    rows, fit = fitting.rows_of("step_time_s"), fitting.time_fit()
    out = fitting.folds(rows) == 0
    x = fit.run(rows.only(~out), fit.run(rows), 6)
    again = fit.errors(rows.only(out), x)
    assert again == pytest.approx(fitting.read_errors("time")["cross-validation"][out], abs=0.01)

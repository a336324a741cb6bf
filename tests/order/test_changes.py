"""[[data.changes]]: the mixture changes in mid-run, and one integer stays the whole state."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.check.parity import miniature
from megagpt.cli import main
from megagpt.config import MixtureChange, RunConfig, dump_run, parse_run
from megagpt.corpus.records import prepare
from megagpt.errors import UsageError
from megagpt.order.loader import TokenLoader, training_loader
from tests.lib.corpus import run_file
from tests.lib.distributed import launch, steps
from tests.order.test_windows import random_documents, write_corpus

N_CTX = 8
RUN = """
seed = 1
output = "{root}/run"
[model]
n_layer = 1
n_head = 1
d_model = 8
n_ctx = 8
vocab_size = 257
[data]
train = [{{ path = "{root}/a" }}, {{ path = "{root}/b", weight = 0 }}]
{changes}
[schedule]
total_tokens = 1280
peak_lr = 1e-3
batch_tokens = 128
"""
CHANGES = """
[[data.changes]]
at_tokens = 256
weights = [0.5, 0.5]

[[data.changes]]
at_tokens = 1024
weights = [0, 1]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two corpora of 100 and 37 windows."""
    root = tmp_path_factory.mktemp("corpora")
    for name, n_tokens in (("a", 801), ("b", 300)):
        write_corpus(root / name, random_documents(n_tokens, n_tokens))
    return root


def config_with(root: Path, changes: list[tuple[int, tuple[float, float]]]) -> RunConfig:
    """The run file with changes at numbers of samples."""
    rows = [
        f"[[data.changes]]\nat_tokens = {first * N_CTX}\nweights = {list(weights)}\n"
        for first, weights in changes
    ]
    text = RUN.format(root=root, changes="".join(rows))
    return parse_run(text if changes else text.replace("weight = 0", "weight = 1"))


def test_the_run_file_says_it_and_is_written_back(root: Path) -> None:
    config = parse_run(RUN.format(root=root, changes=CHANGES))
    assert config.data.changes == (
        MixtureChange(at_tokens=256, weights=(0.5, 0.5)),
        MixtureChange(at_tokens=1024, weights=(0.0, 1.0)),
    )
    assert parse_run(dump_run(config)) == config
    loader = training_loader(config)
    took = [[s["samples"] for s in loader.consumed(n)] for n in (32, 128, 160)]
    assert took == [[32, 0], [80, 48], [80, 80]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            "at_tokens = 0, weights = [1, 1]",
            r"\[0\].at_tokens = 0: must be 1 or more \(Tokens of the",
        ),
        ("at_tokens = 12, weights = [1, 1]", r"at_tokens = 12: must be a multiple of model.n_ctx"),
        (
            "at_tokens = 8, weights = [1]",
            r"weights = \[1.0\]: must be 2 numbers, one for each",
        ),
        (
            "at_tokens = 8, weights = [1, -1]",
            r"weights\[1\] = -1: must be 0 or more \(One for each",
        ),
        ("at_tokens = 8, weights = [0, 0]", r"weights = \[0.0, 0.0\]: one of them must be above"),
        ("at_tokens = 8, weights = [1, inf]", r"weights\[1\] = inf: must be a finite number"),
        ("at_tokens = 8, weights = [1, 0]", r"weight = 0.0 of .*b: must be above 0"),
        (
            "at_tokens = 8, weights = [1, 1] }, { at_tokens = 8, weights = [1, 1]",
            r"\[1\].at_tokens = 8: must be above 8, where the last weights begin",
        ),
    ],
)
def test_what_no_run_can_have(root: Path, changes: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_run(RUN.format(root=root, changes=f"changes = [{{ {changes} }}]"))


def test_a_run_begins_with_something(root: Path) -> None:
    text = RUN.format(root=root, changes=CHANGES).replace('a" }', 'a", weight = 0 }')
    with pytest.raises(UsageError, match="data.train: every weight is 0; one must be above 0"):
        parse_run(text)


weights_st = st.tuples(st.integers(0, 9), st.integers(1, 9))
changes_st = st.lists(st.tuples(st.integers(1, 400), weights_st), min_size=1, max_size=4)


@settings(max_examples=40, deadline=None)
@given(
    changes=changes_st,
    consumed=st.integers(0, 600),
    ranks=st.integers(1, 4),
    micro_batch=st.integers(1, 4),
)
def test_one_integer_is_the_state_across_changes(
    root: Path,
    changes: list[tuple[int, tuple[float, float]]],
    consumed: int,
    ranks: int,
    micro_batch: int,
) -> None:
    """A new loader that goes on anywhere, for any layout, reads what one loader reads in a row."""
    changes = sorted(dict(changes).items())
    whole = training_loader(config_with(root, changes))
    expected = whole.samples(0, 700)
    resumed = training_loader(config_with(root, changes))
    count = 3 * ranks * micro_batch
    rows = np.full((3, ranks, micro_batch, N_CTX), -1)
    for rank in range(ranks):
        for i, (x, _) in enumerate(
            resumed.micro_batches(consumed, count, rank, ranks, micro_batch)
        ):
            rows[i, rank] = x.numpy()
    assert np.array_equal(rows.reshape(count, N_CTX), expected[consumed : consumed + count, :-1])
    # What comes later is free: the past alone has a name, and what was read of it stays.
    begun = [change for change in changes if change[0] < consumed]
    if begun:
        past = training_loader(config_with(root, begun))
        assert past.fingerprint(consumed) == whole.fingerprint(consumed)
        assert past.digest(0, consumed) == whole.digest(0, consumed)
        assert past.consumed(consumed) == whole.consumed(consumed)
    last = changes[-1][0]
    other = training_loader(config_with(root, [*changes[:-1], (last, (1, 99))]))
    assert other.fingerprint(last) == whole.fingerprint(last)
    assert other.fingerprint(last + 1) != whole.fingerprint(last + 1)


def test_data_that_rested_so_far_are_no_part_of_the_past(root: Path) -> None:
    """A corpus that joins with weight 0, or leaves before it had another, changes no past."""

    def loader(train: list[str], changes: dict[int, list[float]]) -> TokenLoader:
        rows = [(root / name, 0.0 if name == "b" else 1.0) for name in train]
        return TokenLoader(rows, N_CTX, 1, changes=list(changes.items()))

    alone = loader(["a"], {})
    grown = loader(["b", "a"], {50: [1, 3]})
    for samples in (1, 20, 50):
        assert grown.fingerprint(samples) == alone.fingerprint(samples)
        assert alone.fingerprint(samples) in grown.known_fingerprints(samples)
        assert grown.fingerprint(samples) in alone.known_fingerprints(samples)
        assert grown.digest(0, samples) == alone.digest(0, samples)
        assert grown.consumed(samples)[1] == alone.consumed(samples)[0]
        # Earlier versions named what rested, and their checkpoints are known under that name.
        assert grown.known_fingerprints(samples)[1] not in alone.known_fingerprints(samples)
    assert grown.fingerprint(51) not in alone.known_fingerprints(51)


def test_the_trace_knows_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = root / "run.toml"
    path.write_text(RUN.format(root=root, changes=CHANGES))
    for step, corpora in ((2, {"a"}), (3, {"a", "b"}), (9, {"b"})):
        assert main(["data", "batch", str(path), "--step", str(step), "--json"]) == 0
        lines = map(json.loads, capsys.readouterr().out.splitlines())
        assert {Path(line["source"]).name for line in lines} == corpora


def test_a_miniature_has_the_mixture_of_the_start(root: Path) -> None:
    small = miniature(parse_run(RUN.format(root=root, changes=CHANGES)), 4, "fp32")
    assert [Path(source.path).name for source in small.data.train] == ["a"]
    assert parse_run(dump_run(small)) == small


def test_a_miniature_reads_whole_records(tmp_path: Path) -> None:
    prepare(tmp_path / "a", records=np.ones((9, 101), int), vocabulary=257)
    text = RUN.format(root=tmp_path, changes="").replace("n_ctx = 8", "n_ctx = 100")
    text = text.replace(f', {{ path = "{tmp_path}/b", weight = 0 }}', "").replace("= 128", "= 100")
    small = miniature(parse_run(text), 4, "fp32")
    assert small.model.n_ctx == 100 and training_loader(small).n_windows == 9


def test_training_goes_on_across_a_change(tmp_path: Path) -> None:
    """Stopped behind one change, it refuses another past, and takes a new change to come.

    A corpus that rested until then leaves, and a new one joins.
    """
    file = run_file(tmp_path, schedule={"total_tokens": 3072, "ramp_tokens": 0})
    for seed, third in enumerate(("rested", "joins")):
        documents = [row for row in random_documents(seed, 2000) if row]
        prepare(tmp_path / third, documents=documents, vocabulary="bytes")
    before, other, later = (
        "{at_tokens=512, weights=[1, 3, 0]}",
        "{at_tokens=512, weights=[1, 4, 0]}",
        "{at_tokens=2560, weights=[0, 1, 1]}",
    )

    def go(changes: str, third: str = "rested", **how: int) -> int:
        folders = [f'{{path="{tmp_path}/{name}"}}' for name in ("train", "validation")]
        resting = f'{{path="{tmp_path}/{third}", weight=0}}'
        words = [
            f"data.train=[{', '.join([*folders, resting])}]",
            f"data.changes=[{changes}]",
            *(f"checkpoint.{k}={v}" for k, v in how.items()),
        ]
        done = launch(file, 1, *words, launcher="python")
        errors.append(done.stderr)
        return done.returncode

    errors: list[str] = []
    assert go(f"{before}, {later}", stop_after_steps=2) == 75
    assert go(f"{other}, {later}") == 2
    assert "data: other shards or weights than the checkpoint was trained on" in errors[-1]
    assert go(f"{before}, {later}", "joins") == 0, errors[-1]
    loader = training_loader(parse_run((tmp_path / "run/config.toml").read_text()))
    records, first = steps(tmp_path / "run"), 0
    for record in records:
        assert record["digest"] == loader.digest(first, record["samples"] - first)
        first = record["samples"]
    taken = {name: source["tokens"] for name, source in records[-1]["sources"].items()}
    assert taken == {"train": 24 * 32, "validation": (8 + 48 + 8) * 32, "joins": 8 * 32}

"""The documents behind a step."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import load_run
from megagpt.corpus.manifest import CorpusManifest, Shard, write_manifest
from megagpt.corpus.shards import HEADER, MAGIC, index_bytes
from megagpt.errors import DamageError, UsageError
from megagpt.order.command import add_batch
from megagpt.order.loader import TokenLoader
from megagpt.order.trace import spans, trace
from megagpt.order.windows import TokenWindows
from megagpt.tokenizer import fingerprint, load_tokenizer
from tests.lib.corpus import edit_manifest
from tests.order.test_windows import END, random_documents, write_corpus

RUN = """
seed = 1
output = "{root}/run"
[model]
n_layer = 1
n_head = 1
d_model = 8
n_ctx = 16
vocab_size = 257
[data]
train = [{{ path = "{root}/a", weight = 3 }}, {{ path = "{root}/b", weight = 1 }}]
[schedule]
total_tokens = 640
peak_lr = 1e-3
batch_tokens = 128
ramp_start_tokens = 64
ramp_tokens = 128
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """Two corpora of text in bytes and a run of 6 steps: 4 samples in the first 2, then 8."""
    encoding = load_tokenizer("bytes")
    for name in "ab":
        texts = [f"{name}{i}: line one\nand \u00e9\u00e8 number two" for i in range(30)]
        documents = [encoding.encode_ordinary(text) for text in texts]
        write_corpus(tmp_path / name, documents, 200, fingerprint=fingerprint(encoding))
    path = tmp_path / "run.toml"
    path.write_text(RUN.format(root=tmp_path))
    return path


def batch(*words: object) -> int:
    """The command as the command line runs it."""
    parser = argparse.ArgumentParser()
    add_batch(parser.add_subparsers())
    args = parser.parse_args(["batch", *map(str, words)])
    return args.run(args)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    n_tokens=st.integers(2, 300),
    shard_tokens=st.integers(1, 120),
    data=st.data(),
)
def test_spans_are_the_documents(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    n_tokens: int,
    shard_tokens: int,
    data: st.DataObject,
) -> None:
    """Any stretch of any corpus: its spans tile it, and each is that part of that document."""
    folder = tmp_path_factory.mktemp("c") / "corpus"
    documents = random_documents(seed, n_tokens)
    tokens = write_corpus(folder, documents, shard_tokens)
    first = data.draw(st.integers(0, n_tokens - 1))
    count = data.draw(st.integers(1, n_tokens - first))
    at, last = 0, -1
    for span in spans(TokenWindows(folder), first, count):
        assert span.start == at and span.tokens > 0 and span.document > last
        whole = [*documents[span.document], END]
        part = whole[span.offset : span.offset + span.tokens]
        assert part == tokens[first + at : first + at + span.tokens].tolist()
        at, last = at + span.tokens, span.document
    assert at == count


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """As Megatron writes them: documents of 2, 0 and 1 sequences."""
    tokens = np.array([1, 2, END, 3, END, 4, 5, END], "<u2")
    (tmp_path / "s.bin").write_bytes(tokens.tobytes())
    sizes, pointers, starts = [3, 2, 3], [0, 6, 10], [0, 2, 2, 3]
    arrays = [
        np.array(a, d).tobytes() for a, d in ((sizes, "<i4"), (pointers, "<i8"), (starts, "<i8"))
    ]
    (tmp_path / "s.idx").write_bytes(HEADER.pack(MAGIC, 1, 8, 3, 4) + b"".join(arrays))
    write_manifest(
        CorpusManifest(
            folder=tmp_path,
            tokenizer_name="bytes",
            vocab_size=257,
            end_of_document=END,
            fingerprint="",
            dtype=np.dtype("<u2"),
            shards=(Shard("s", 8, 3, 16, "0" * 64, "0" * 64),),
        )
    )
    assert list(spans(TokenWindows(tmp_path), 0, 8)) == [(0, 0, 0, 5), (2, 0, 5, 3)]
    assert list(spans(TokenWindows(tmp_path), 4, 3)) == [(0, 4, 0, 1), (2, 0, 1, 2)]


def test_trace_is_what_the_loader_gives(run_file: Path, tmp_path: Path) -> None:
    loader = TokenLoader([(tmp_path / "a", 3), (tmp_path / "b", 1)], 16, seed=1)
    samples = list(trace(loader, 100, 20))
    assert [sample.number for sample in samples] == list(range(100, 120))
    assert np.array_equal(np.stack([s.tokens for s in samples]), loader.samples(100, 20))
    for sample in samples:
        assert sum(span.tokens for span in sample.spans) == 17
    windows = loader.stores[0].n_windows(16)
    mine = [s for s in samples if s.source == tmp_path / "a"]
    assert mine[0].epoch == loader.consumed(100)[0]["samples"] // windows == 1


def test_every_step_of_a_run(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All steps by the command: each sample of the run once, the text that was prepared."""
    numbers = []
    for step in range(1, 7):
        assert batch(run_file, "--step", step, "--json") == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        for line in lines:
            corpus, text = Path(line["source"]).name, line["text"]
            whole = f"{corpus}{line['document']}: line one\nand \u00e9\u00e8 number two"
            part = whole.encode()[line["offset"] : line["offset"] + line["tokens"]]
            assert part.decode("utf-8", "replace") == text
            assert line["ids"] == [*part, 256][: line["tokens"]]
        numbers += sorted({line["sample"] for line in lines})
    assert numbers == list(range(40))


def test_what_people_see(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert batch(run_file, "--step", 3, "--characters", 4) == 0
    lines = capsys.readouterr().out.splitlines()
    loader = TokenLoader([(tmp_path / "a", 3), (tmp_path / "b", 1)], 16, seed=1)
    digest = loader.digest(8, 8)
    assert lines[0] == f"step 3: samples 8 to 15, 128 tokens, digest {digest} (not trained yet)"
    assert lines[2].startswith("sample 8: ") and ", epoch 0, window " in lines[2]
    assert lines[3].split() == ["document", "offset", "tokens", "text"]
    assert lines[4].endswith('..."') and len(lines[4]) < 50


def test_the_record_of_the_run_must_agree(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loader = TokenLoader([(tmp_path / "a", 3), (tmp_path / "b", 1)], 16, seed=1)
    (tmp_path / "run").mkdir()
    record = {"step": 3, "loss": 1.0, "digest": loader.digest(8, 8)}
    (tmp_path / "run" / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "run" / "config.toml").write_text(run_file.read_text())
    assert batch(tmp_path / "run", "--step", 3) == 0
    assert "(as recorded by the run)" in capsys.readouterr().out
    assert batch(run_file, "--step", 4) == 0
    assert "(not trained yet)" in capsys.readouterr().out
    with pytest.raises(UsageError, match=r"step 3 has digest .* was trained with .*seed"):
        batch(run_file, "seed=2", "--step", 3)


@pytest.mark.parametrize("step", [0, 7])
def test_a_step_outside_the_run(run_file: Path, step: int) -> None:
    assert load_run(run_file).schedule.n_steps == 6
    with pytest.raises(UsageError, match=rf"--step {step}: the run has the steps 1 to 6"):
        batch(run_file, "--step", step)


@pytest.mark.parametrize("change", ["unknown name", "another tokenizer"])
def test_ids_where_no_tokenizer_fits(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str
) -> None:
    for name in "ab":
        if change == "unknown name":
            edit_manifest(tmp_path / name, tokenizer__name="gpt9")
        else:
            edit_manifest(tmp_path / name, tokenizer__fingerprint="0" * 64)
    assert batch(run_file, "--step", 1, "--json") == 0
    for line in map(json.loads, capsys.readouterr().out.splitlines()):
        assert len(line["text"].split()) == line["tokens"]


def test_an_index_that_does_not_fit_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [[1] * 9] * 5, shard_tokens=100)
    path = tmp_path / "c" / "c_00000.idx"
    path.write_bytes(index_bytes(np.array([], np.int64), np.dtype("<u2")))
    with pytest.raises(
        DamageError, match=r"c_00000.idx: tells of no document at token 20 .* has 50"
    ):
        list(spans(TokenWindows(tmp_path / "c"), 20, 5))

"""A plan, the doctor and a job name corpora that do not fit the run, or that are not there."""

import json

import pytest

from megagpt.check.findings import OK, WARN
from megagpt.check.run_file import check_reading
from megagpt.cli import main
from megagpt.config import load_run
from megagpt.corpus.manifest import SPLIT_RULE, read_manifest
from megagpt.plan.corpora import BY_HASH, mismatches
from tests.lib.corpus import edit_manifest, run_file, sentences, write_corpus

SOURCE = [{"path": "a.txt", "bytes": 1, "sha256": "00"}]


@pytest.fixture
def path(tmp_path):
    return run_file(tmp_path)


def found(path, *overrides):
    return list(mismatches(load_run(path, overrides)))


def test_what_fits_is_not_spoken_of(path):
    assert found(path) == []
    assert found(path, "data.train=[{path='none'}]") == []
    (path.parent / "train/manifest.json").write_text("[]")
    assert found(path) == []


def test_another_vocabulary_is_named_by_the_plan(path, capsys):
    [text, other] = found(path, "model.vocab_size=300")
    assert "train: 257 tokens in its vocabulary, but model.vocab_size = 300" in text
    assert "validation: 257" in other
    assert main(["plan", str(path), "model.vocab_size=300"]) == 0
    assert text in " ".join(capsys.readouterr().out.split())


def test_the_plan_says_what_training_refuses_to_begin_without(path, tmp_path, capsys):
    words = ["plan", str(path), f"data.train=[{{path='{tmp_path}/none'}}]"]
    assert main(words) == 0
    assert f"note: {tmp_path}/none: no prepared corpus there" in capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    [note] = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith(f"{tmp_path}/none: no prepared corpus there, and training will refuse")
    tokens = read_manifest(tmp_path / "train").tokens
    exactly = ["schedule.ramp_start_tokens=0", "schedule.ramp_tokens=0", "data.validation=[]"]
    for n_ctx, count in ((tokens - 1, 0), (tokens, 1)):
        words = [f"model.n_ctx={n_ctx}", f"schedule.batch_tokens={n_ctx}", *exactly]
        assert len(texts := found(path, *words)) == count
    [text] = texts
    assert f"train: {tokens} tokens do not fill one window of n_ctx + 1 = {tokens + 1}" in text


def test_documents_that_are_trained_and_validated_on(path, tmp_path):
    same = f"data.validation=[{{path='{tmp_path}/train'}}]"
    [text] = found(path, same)
    assert "is validated on, but it is trained on too" in text
    assert "prepare the corpus with --validation-fraction" in text
    copy = write_corpus(tmp_path / "copy", sentences(600, 1))
    [text] = found(path, f"data.validation=[{{path='{copy}'}}]")
    assert "the training corpus holds the same tokens" in text
    # Prepared twice from one file: the first time all of it, then a share of it.
    assert SPLIT_RULE.startswith(BY_HASH)
    for name, fraction in (("train", 0.0), ("validation", 0.1)):
        edit_manifest(tmp_path / name, split__validation_fraction=fraction, split__rule=SPLIT_RULE,
                      sources=SOURCE)  # fmt: skip
    [text] = found(path)
    assert "the training corpus was made of the same files, all of them" in text
    edit_manifest(tmp_path / "train", split__validation_fraction=0.1)
    assert found(path) == []


def test_the_doctor_counts_epochs(path, tmp_path):
    checks = list(check_reading(load_run(path)))
    assert [(one.name, one.status) for one in checks] == [("epochs", OK)]
    checks = list(check_reading(load_run(path, ["schedule.total_tokens=1e9"])))
    assert checks[0].status == WARN and "lower schedule.total_tokens" in checks[0].remedy
    same = load_run(path, [f"data.validation=[{{path='{tmp_path}/train'}}]"])
    last = list(check_reading(same))[-1]
    assert (last.name, last.status) == ("validation", WARN) and "trained on too" in last.detail


def test_a_job_whose_corpora_are_not_there(path, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    job = ["launch", "slurm", str(path), "data.train=[{path='data/none'}]", "--nodes", "1",
           "--gpus-per-node", "1", "--time", "60"]  # fmt: skip
    assert main(job) == 0
    assert "note: data/none: no prepared corpus there" in capsys.readouterr().out
    assert main([*job, "--submit"]) == 2
    assert "the job will end at once without it" in capsys.readouterr().err
    # Copied by the job itself; what ends it here is that there is no SLURM.
    monkeypatch.setenv("STAGE", "corpora/none")
    monkeypatch.setenv("PATH", "")
    assert main([*job, "--submit"]) == 2
    assert "no prepared corpus there" not in capsys.readouterr().err
    assert main([*job, "model.vocab_size=300"]) == 0
    assert "training will refuse it" in capsys.readouterr().out


def test_the_doctor_on_a_login_node(path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert main(["doctor", str(path), "--nodes", "3", "--gpus-per-node", "8"]) == 2
    told = capsys.readouterr().out
    assert "none on this host, the job wants 8 on each of its hosts" in told
    assert "srun python -m megagpt.doctor" in told
    assert "must be a multiple of the 24 data ranks" in told
    assert main(["doctor", str(path), "--nodes", "1", "--gpus-per-node", "4"]) == 0
    assert "on each host for the copy of a checkpoint" in capsys.readouterr().out
    assert main(["doctor", str(path), "--nodes", "2"]) == 2
    assert "--nodes 2 --gpus-per-node 0: give both" in capsys.readouterr().err

"""EleutherAI's harness asks our server as it asks any other: no adapter, the same figures."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.cli import main
from tests.lib.harness_tasks import (
    TASKS,
    asked_by_the_harness,
    by_transformers,
    harness_figures,
    make_tasks,
)
from tests.lib.server import serving

pytest.importorskip("lm_eval")
pytest.importorskip("accelerate")  # of the harness's own class for transformers
pytest.importorskip("tenacity")  # of its class for servers
N_CTX = 512
"""Longer than any document here: through a server the harness cuts longer ones at other places."""


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    yield


def test_the_server_gives_the_figures_of_adapter_and_transformers(tmp_path, capsys):
    make_tasks(tmp_path, N_CTX, seed=17)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert max(len(row["text"]) for row in rows) < N_CTX - 2
    expected = by_transformers(tmp_path)
    assert len(expected) == 9
    assert expected["local_words acc,none"] == expected["local_answer exact_match,none"] == 0.5
    words = ["--harness", ",".join(TASKS), "--include-path", str(tmp_path / "tasks"), "--json"]
    assert main(["evaluate", str(tmp_path / "model"), *words]) == 0
    adapted = harness_figures(json.loads(capsys.readouterr().out)["results"])
    with serving(tmp_path / "model", tmp_path / "log", "--name", "tiny") as server:
        # One request at a time; then texts of several requests in one batch.
        for concurrent in (1, 4):
            through = asked_by_the_harness(
                tmp_path,
                "local-completions",
                model="tiny",
                base_url=server.url + "/v1/completions",
                tokenizer=str(tmp_path / "export"),
                tokenizer_backend="huggingface",
                tokenized_requests=True,
                max_length=N_CTX,
                num_concurrent=concurrent,
            )
            assert through == pytest.approx(expected, rel=1e-6, abs=1e-6)
            assert through == pytest.approx(adapted, rel=1e-6, abs=1e-6)

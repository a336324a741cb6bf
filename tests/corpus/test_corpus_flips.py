"""Flipped bits in every file of a corpus are found: a short form of the campaign, and the long."""

from pathlib import Path

import pytest

from tests.lib.corpus_flips import campaign, lost


def test_flipped_bits_are_found(tmp_path: Path) -> None:
    result = campaign(tmp_path / "work", 15, seed=7)
    assert lost(result) == {}
    assert all(counts["tried"] == 15 for counts in result.values())
    for kind in ("manifest.json", "tokenizer.json", ".bin", ".idx", "Megatron .idx"):
        assert result[kind]["found"] == 15, kind


@pytest.mark.slow
def test_many_flipped_bits_are_found(tmp_path: Path) -> None:
    assert lost(campaign(tmp_path / "work", 600, seed=1)) == {}

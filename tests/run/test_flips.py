"""One flipped bit in anything that a run leaves is named, or changes nothing."""

import random
from pathlib import Path

import pytest

from tests.lib.distributed import group_of_one
from tests.lib.flips import Flips


@pytest.fixture(scope="module")
def flips(tmp_path_factory: pytest.TempPathFactory):
    """A campaign by a fixed seed, in its folder."""
    with pytest.MonkeyPatch.context() as patch, group_of_one():
        patch.chdir(tmp_path_factory.mktemp("flips"))
        made = Flips(Path.cwd(), random.Random(14))
        made.prepare()
        yield made


def believed(flips: Flips, group: str) -> dict[str, int]:
    """Flips of a group that were believed, by file."""
    tallies = {n: t for n, t in flips.tallies.items() if n.startswith(group)}
    assert all(t["tried"] == t["found"] + t["harmless"] + t["believed"] for t in tallies.values())
    return {name: tally["believed"] for name, tally in tallies.items() if tally["believed"]}


def test_no_bit_of_a_checkpoint_is_believed(flips):
    flips.checkpoint(60)
    assert not believed(flips, "checkpoint")
    assert len([name for name in flips.tallies if name.startswith("checkpoint/")]) == 5


def test_no_bit_of_consolidated_weights_is_believed(flips):
    flips.consolidated(100)
    assert not believed(flips, "consolidated") and not believed(flips, "opened")
    assert len([name for name in flips.tallies if name.startswith("consolidated/")]) == 4


def test_no_bit_of_the_journal_is_believed(flips):
    flips.journal(60)
    assert not believed(flips, "run/journal.jsonl")


def test_a_bit_of_another_file_of_the_run_folder_changes_no_weight(flips):
    flips.starts(3)
    assert not believed(flips, "run")


@pytest.mark.slow
def test_the_campaign(flips, capsys):
    flips.checkpoint(2000)
    flips.consolidated(2000)
    flips.journal(2000)
    flips.starts(60)
    assert not believed(flips, "")

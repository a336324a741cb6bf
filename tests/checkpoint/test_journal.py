"""What was decided about spikes is written, read back, and replayed."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from megagpt.checkpoint.journal import Journal, read_journal
from megagpt.checkpoint.record import list_checkpoints, read_record, write_record
from megagpt.cli import main
from megagpt.errors import DamageError, MegagptError
from tests.lib.hostile_commands import FIXTURE


def test_where_a_run_reads_after_rollbacks():
    journal = Journal(((10, 40),))
    assert [journal.skipped_samples(step) for step in (0, 9, 10, 99)] == [0, 0, 40, 40]
    journal = journal.add(20, 90)
    assert [journal.skipped_samples(step) for step in (19, 20)] == [40, 90]
    # Back before the second one, which therefore never happened; twice from the same step.
    journal = journal.add(15, 70)
    journal = journal.add(15, 75)
    assert journal.holding == [(10, 40), (15, 75)]
    assert journal.skipped_samples(20) == 75


def test_which_updates_a_run_leaves_out_after_rollbacks():
    journal = Journal()
    journal = journal.skip_update(12)
    journal = journal.skip_update(15)
    assert [step for step in range(20) if journal.skips_update(step)] == [12, 15]
    # Back to a checkpoint that step 12 is part of, but step 15 is not.
    journal = journal.add(12, 30)
    assert [step for step in range(20) if journal.skips_update(step)] == [12]
    journal = journal.skip_update(14)
    assert journal.holding == [(12, None), (12, 30), (14, None)]
    assert Journal(journal.entries).holding == journal.holding
    assert [journal.skipped_samples(step) for step in (11, 12, 20)] == [0, 30, 30]


def test_the_journal_reads_back(tmp_path):
    assert read_journal(tmp_path) == Journal()
    journal = Journal()
    journal = journal.add(10, 40)
    journal.write(tmp_path, reason="loss 9")
    journal = journal.skip_update(13)
    journal.write(tmp_path, reason="loss 9")
    assert read_journal(tmp_path) == journal == Journal(((10, 40), (13, None)))
    path = tmp_path / "journal.jsonl"
    whole = path.read_bytes()
    for end in range(whole.index(b"\n") + 1, len(whole)):
        path.write_bytes(whole[:end])
        assert read_journal(tmp_path) == Journal(((10, 40),))
    journal.write(tmp_path, reason="loss 9")
    assert path.read_bytes() == whole


@pytest.mark.parametrize("left", [None, b"", b'{"step": 10, "skip'])
def test_a_journal_that_is_gone_comes_back_with_the_next_entry(tmp_path, left):
    if left is not None:
        (tmp_path / "journal.jsonl").write_bytes(left)
    journal = Journal(((10, 40), (13, None)))
    journal = journal.add(20, 90)
    journal.write(tmp_path, reason="loss 9")
    assert read_journal(tmp_path) == journal
    assert journal.entries == ((10, 40), (13, None), (20, 90))


def test_a_damaged_journal_is_not_guessed_at(tmp_path):
    for line in ('{"step": 1}', '{"step": 1, "update": "done"}', '{"update": "left out"}', "[1]"):
        (tmp_path / "journal.jsonl").write_text(line + '\n{"step": 2, "skipped_samples": 4}\n')
        message = "line 1: not an entry of the journal; it decides which samples are read and"
        with pytest.raises(DamageError, match=message):
            read_journal(tmp_path)


def journal_of(run: Path, entries: int = 3) -> Path:
    """A journal of so many entries, updates left out and rollbacks in turn; its file."""
    journal = Journal()
    for step in range(10, 10 + entries):
        journal = journal.add(step, 4 * step) if step % 2 else journal.skip_update(step)
        journal.write(run, reason=f"loss {step}")
    return run / "journal.jsonl"


def test_every_bit_of_a_journal_counts(tmp_path):
    path = journal_of(tmp_path)
    whole, entries = path.read_bytes(), read_journal(tmp_path).entries
    assert entries == ((10, None), (11, 44), (12, None))
    for place in range(len(whole)):
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            path.write_bytes(data)
            with pytest.raises(DamageError, match="journal.jsonl, line"):
                read_journal(tmp_path)


def test_lines_without_a_checksum_are_of_earlier_versions(tmp_path):
    path = tmp_path / "journal.jsonl"
    old = b'{"step": 15, "update": "left out", "reason": "loss 3.3"}\n'
    path.write_bytes(old)
    assert read_journal(tmp_path) == Journal(((15, None),))
    Journal(((15, None), (20, 16))).write(tmp_path, spiked_step=21, reason="loss 4")
    assert path.read_bytes().startswith(old)
    assert read_journal(tmp_path) == Journal(((15, None), (20, 16)))


@pytest.mark.parametrize(
    ("entries", "sealed", "wrong"),
    [
        ([], [], None),
        ([], [(10, None), (11, 44)], None),
        ([(10, None), (11, 44)], [(10, None)], None),
        ([(10, None), (11, 44)], [(10, None), (11, 44)], None),
        ([(10, None), (11, 44)], [(10, None), (11, 45)], 2),
        ([(10, None), (11, 44)], [(11, None)], 1),
        ([(11, 44), (10, None)], [(10, None), (11, 44)], 1),
        ([(10, None)], [(10, None), (11, 44)], 2),
    ],
)
def test_a_journal_begins_as_the_checkpoint_says(tmp_path, entries, sealed, wrong):
    journal = Journal(tuple(entries))
    if wrong is None:
        assert journal.agree(sealed, tmp_path).entries == tuple(entries or sealed)
        return
    message = (
        f"journal.jsonl: entry {wrong} is not the one that the checkpoint holds, .*; restore the "
        "file, or move it away: then the checkpoint's copy is used"
    )
    with pytest.raises(DamageError, match=message):
        journal.agree(sealed, tmp_path)


def test_rollbacks_end():
    journal = Journal(((5, 1), (5, 2), (6, 3), (5, 4)))
    with pytest.raises(MegagptError, match="spikes again after 3 rollbacks to step 5; lower"):
        journal.add(5, 9)


def test_verify_compares_the_file_with_the_checkpoints_copy(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(FIXTURE / "run", run)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step_00000018  whole\n"
    (folder,) = list_checkpoints(run)
    saved = read_record(folder)
    write_record(folder, dataclasses.replace(saved, rollbacks=((9, None),)))
    Journal(((9, None),)).write(run)
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert capsys.readouterr().out == "step_00000018  whole\njournal.jsonl  whole\n"
    (run / "journal.jsonl").unlink()
    Journal(((8, None),)).write(run)
    assert main(["checkpoint", "verify", str(run)]) == 3
    assert "entry 1 is not the one that the checkpoint holds" in capsys.readouterr().out
    (run / "journal.jsonl").write_text("{}\n")
    assert main(["checkpoint", "verify", str(run)]) == 3
    assert "journal.jsonl, line 1: not an entry" in capsys.readouterr().out

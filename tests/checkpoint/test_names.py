"""Names in a run's folder of checkpoints: their order, and those that users give."""

import shutil

from megagpt.checkpoint import Saver, list_checkpoints, record, resume, verify
from megagpt.cli import main
from tests.lib.checkpoints import fingerprint, state


def test_the_order_of_checkpoints_is_that_of_their_numbers(tmp_path):
    names = ["step_00000009", "step_00000010", "step_99999999", "step_100000000", "step_999999999"]
    for name in reversed(names):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == names
    assert [record.step_of(folder) for folder in list_checkpoints(tmp_path)][-2] == 100_000_000
    assert record.name_of(100_000_000) == "step_100000000"


USERS = (
    "step_best",
    "step_00000004_backup",
    "step_00000004-old",
    "step_00000004 (copy)",
    "my_step_00000004",
    "step_",
    "step_\N{ARABIC-INDIC DIGIT FOUR}",
    "notes.tmp",
    "step_best.tmp",
)
"""Names of folders that users give."""


def test_a_users_folders_are_neither_read_nor_removed(run, config, engine):
    folders, inside = list_checkpoints(run), run / "checkpoints"
    newest = folders[-1]
    for name in USERS:
        shutil.copytree(folders[0], inside / name)
    (inside / "todo.tmp").write_text("a file")
    # Checkpoints that a user has moved to a larger disk and linked, and a copy under a plain name.
    elsewhere = run.parent / "elsewhere"
    shutil.move(folders[0], elsewhere)
    folders[0].symlink_to(elsewhere)
    (inside / "step_00000000").symlink_to(run.parent / "gone")
    shutil.copytree(folders[1], inside / f"step_{record.step_of(folders[1])}")
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and saved.step == record.step_of(newest)
    saver = Saver(run, config, engine)
    for step in (997, 998, 999):
        saver.begin(state(step, saved))
        assert saver.finish() is not None
    resume(run, config, engine, fingerprint(run))
    assert all((inside / name / "config.toml").is_file() for name in USERS)
    assert (inside / "todo.tmp").is_file() and verify(elsewhere) == [] and folders[0].is_symlink()
    assert verify(inside / f"step_{record.step_of(folders[1])}") == []
    assert not newest.exists()
    assert [record.step_of(folder) for folder in list_checkpoints(run)][-3:] == [997, 998, 999]


def test_a_link_where_a_checkpoint_is_to_be_written_is_no_reason_to_stop(run, config, engine):
    saved, inside = resume(run, config, engine, fingerprint(run)), run / "checkpoints"
    assert saved is not None
    (inside / "step_00000997.tmp").symlink_to(run.parent)
    (inside / "step_00000998.tmp").symlink_to(run.parent)
    (inside / "step_00000998").symlink_to(run.parent / "gone")
    saver = Saver(run, config, engine)
    for step in (997, 998):
        saver.begin(state(step, saved))
        assert saver.finish() is not None
    # Of a link the link alone is removed.
    (inside / "step_00000999.tmp").symlink_to(run.parent)
    resume(run, config, engine, fingerprint(run))
    assert not (inside / "step_00000999.tmp").is_symlink() and run.is_dir()
    assert (inside / "step_00000998.damaged1").is_symlink()


def test_a_copy_under_another_steps_name_is_not_that_step(run, config, engine, capsys):
    older, newest = list_checkpoints(run)[-2:]
    wrong = newest.with_name("step_99999999")
    shutil.copytree(older, wrong)
    assert main(["checkpoint", "verify", str(run)]) == 3
    of = record.step_of(older)
    assert f"{wrong}: is of step {of} by its manifest; give it its name again" in (
        capsys.readouterr().out
    )
    saved = resume(run, config, engine, fingerprint(run))
    assert saved is not None and saved.step == record.step_of(newest)
    assert wrong.with_name("step_99999999.damaged1").is_dir()

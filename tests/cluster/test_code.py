"""The digest of the code: the same for the same sources, another for any change."""

import shutil

from megagpt.cluster.code import PACKAGE, code_digest


def test_a_copy_has_the_same_digest_and_a_changed_one_has_not(tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    own = code_digest()
    assert code_digest(copy) == own
    assert len(own) == 64
    changed = copy / "plan" / "layout.py"
    changed.write_text(changed.read_text() + "\n")
    assert code_digest(copy) != own


def test_names_count_and_other_files_do_not(tmp_path):
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    first = code_digest(tmp_path)
    (tmp_path / "a.pyc").write_text("compiled")
    assert code_digest(tmp_path) == first
    (tmp_path / "b.py").rename(tmp_path / "c.py")
    assert code_digest(tmp_path) != first


def test_where_a_file_ends_counts(tmp_path):
    (tmp_path / "a.py").write_text("one")
    (tmp_path / "b.py").write_text("two")
    first = code_digest(tmp_path)
    (tmp_path / "a.py").write_text("onetw")
    (tmp_path / "b.py").write_text("o")
    assert code_digest(tmp_path) != first

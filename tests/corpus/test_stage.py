"""Corpora on a host's own disk: copied once, by one process, and nothing damaged."""

import os
import shutil
import subprocess
import sys

import pytest

from megagpt.cli import main
from megagpt.corpus.stage import stage
from megagpt.corpus.verify import verify_shards
from megagpt.errors import DamageError, UsageError
from tests.lib.corpus import sentences, write_corpus
from tests.lib.distributed import environment, python


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "web", sentences(400, 1))


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir() if not path.name.startswith("."))


def test_a_copy_is_whole_and_made_once(corpus, tmp_path, capsys):
    copy, copied = stage(corpus, tmp_path / "scratch")
    assert copy == tmp_path / "scratch" / "web" and copied == size(corpus) == size(copy)
    assert verify_shards(copy) == []
    assert main(["data", "stage", str(corpus), str(tmp_path / "scratch")]) == 0
    assert capsys.readouterr().out == f"{copy}: 0 bytes copied\n"
    # What is missing, or was changed since, is copied again.
    first, second = sorted(copy.glob("*.bin"))[:2]
    first.unlink()
    second.write_bytes(second.read_bytes()[::-1])
    again = first.name, second.name, "manifest.json"
    assert stage(corpus, tmp_path / "scratch")[1] == sum((corpus / n).stat().st_size for n in again)
    assert verify_shards(copy) == []


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_state_that_cannot_be_read_only_costs_time(corpus, tmp_path, text):
    copy, _ = stage(corpus, tmp_path / "scratch")
    whole = (copy / ".staged.json").read_text()
    (copy / ".staged.json").write_text(text)
    assert stage(corpus, tmp_path / "scratch")[1] == 0
    assert (copy / ".staged.json").read_text() == whole


def test_a_state_names_no_file_elsewhere(corpus, tmp_path):
    copy, _ = stage(corpus, tmp_path / "scratch")
    (tmp_path / "scratch" / "mine").touch()
    (copy / ".staged.json").write_text('{"../mine": "", "more": ""}')
    (copy / "more").touch()
    stage(corpus, tmp_path / "scratch")
    assert (tmp_path / "scratch" / "mine").exists() and not (copy / "more").exists()


KILLED = """
import os, pathlib, sys
from megagpt.corpus import stage
from megagpt.files import BLOCK, file_sha256

count = 0
def dies(path, progress=None, copy=None):
    global count
    count += copy is not None
    if count == 4:
        copy.write(path.read_bytes()[:1000])
        copy.flush()
        os.kill(os.getpid(), 9)
    return file_sha256(path, progress, copy)

stage.file_sha256 = dies
stage.stage(*map(pathlib.Path, sys.argv[1:]))
"""


def test_one_that_was_killed_goes_on_with_what_is_whole(corpus, tmp_path):
    assert python(KILLED, str(corpus), str(tmp_path / "scratch")).returncode == -9
    copy = tmp_path / "scratch" / "web"
    there = sorted(path for path in copy.iterdir() if not path.name.startswith("."))
    assert len(there) == 3 and len(list(copy.glob(".*.tmp"))) == 1
    # Of a right size, and not whole.
    damaged = there[0]
    damaged.write_bytes(bytes(damaged.stat().st_size))
    inodes = {path: path.stat().st_ino for path in there[1:]}
    _, copied = stage(corpus, tmp_path / "scratch")
    assert copied == size(corpus) - sum(path.stat().st_size for path in there[1:])
    assert inodes == {path: path.stat().st_ino for path in there[1:]}
    assert verify_shards(copy) == [] and not list(copy.glob(".*.tmp"))


def test_a_disk_that_is_fuller_than_it_tells(corpus, tmp_path, monkeypatch):
    """As one with a quota, or one that others fill meanwhile."""
    place = tmp_path / "scratch"
    place.mkdir()
    room = size(corpus) * 2 // 3
    line = ["mount", "-t", "tmpfs", "-o", f"size={room}", "none", str(place)]
    if os.geteuid() != 0 or subprocess.run(line, capture_output=True).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        told = shutil.disk_usage(place)
        tells = iter([told._replace(free=1 << 40), told._replace(free=17)])
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _: next(tells))
            with pytest.raises(UsageError) as error:
                stage(corpus, place)
        there = [path for path in (place / "web").iterdir() if not path.name.startswith(".")]
        missing = size(corpus) - sum(path.stat().st_size for path in there)
        assert str(error.value).startswith(f"{place}/web: {missing:,} bytes are needed and 17 are")
        assert there and not (place / "web/manifest.json").exists()
        assert not list((place / "web").glob(".*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=9m", str(place)], check=True)
        assert stage(corpus, place)[1] == missing
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("before", [False, True])
def test_a_damaged_original_is_named_and_not_copied(corpus, tmp_path, before):
    if before:
        stage(corpus, tmp_path / "scratch")
        shutil.rmtree(corpus)
        write_corpus(corpus, sentences(1400, 1))
    shard = sorted(corpus.glob("*.bin"))[1]
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    with pytest.raises(DamageError, match=f"{shard}: sha256 .*, the manifest says "):
        stage(corpus, tmp_path / "scratch")
    copy = tmp_path / "scratch" / "web"
    # Without its manifest no training would take it.
    assert not (copy / shard.name).exists() and not (copy / "manifest.json").exists()
    assert not list(copy.glob("*.tmp")) and not list(copy.glob(".*.tmp"))


@pytest.mark.parametrize("lines", [1400, 100])
def test_a_corpus_that_was_prepared_again_is_the_copy(corpus, tmp_path, lines):
    stage(corpus, tmp_path / "scratch")
    shutil.rmtree(corpus)
    write_corpus(corpus, sentences(lines, 1))
    copy, _ = stage(corpus, tmp_path / "scratch")
    assert (copy / "manifest.json").read_bytes() == (corpus / "manifest.json").read_bytes()
    assert verify_shards(copy) == []


def test_two_folders_of_one_name_are_not_one_copy(corpus, tmp_path, capsys):
    other = write_corpus(tmp_path / "other" / "web", sentences(400, 2))
    words = ["data", "stage", str(corpus), str(other), str(tmp_path / "scratch")]
    assert main(words) == 2
    assert "folders of one name would be one copy; give them" in capsys.readouterr().err
    assert not (tmp_path / "scratch").exists()


def test_processes_of_a_host_copy_once(corpus, tmp_path):
    line = [
        sys.executable,
        "-m",
        "megagpt",
        "data",
        "stage",
        str(corpus),
        str(tmp_path / "scratch"),
    ]
    processes = [
        subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = sorted(process.communicate(timeout=120)[0].split(": ")[1] for process in processes)
    assert said == ["0 bytes copied\n", "0 bytes copied\n", f"{size(corpus):,} bytes copied\n"]


def test_a_shard_that_is_not_there(corpus, tmp_path):
    shard = sorted(corpus.glob("*.bin"))[1]
    shard.unlink()
    with pytest.raises(DamageError, match=f"{shard}: missing; restore it, or prepare "):
        stage(corpus, tmp_path / "scratch")


def test_what_cannot_be_staged(corpus, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="lies there already; give another folder"):
        stage(corpus, tmp_path)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(UsageError, match=r"web: [\d,]+ bytes are needed and 10 are free"):
        stage(corpus, tmp_path / "scratch")

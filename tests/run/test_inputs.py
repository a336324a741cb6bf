"""What a run reads is whole: every damaged shard is named, and none is read again for nothing."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megagpt.config import RunConfig, load_run
from megagpt.engine import Engine, Ranks, build_engine
from megagpt.errors import DamageError, UsageError
from megagpt.order.fitting import check_vocabulary
from megagpt.order.loader import TokenLoader
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import Layout
from megagpt.run import volume
from megagpt.run.inputs import MEMORY, OWN, _places, check_data, evaluation_samples
from megagpt.run.volume import volume_of
from tests.lib.corpus import edit_manifest, run_file
from tests.lib.distributed import environment, free_port, group_of_one


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    config = load_run(run_file(tmp_path_factory.mktemp("engine")), ["model.n_layer=1"])
    with group_of_one():
        ds_config = resolve(config, Layout(), read_ds_config("zero1"))
        made = build_engine(config, Layout(), Ranks(), ds_config)
        yield made
        made.close()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return load_run(run_file(tmp_path))


class Reading:
    """check_data over the corpora of a run file; counts the calls of `alive`."""

    @property
    def memory(self) -> Path:
        """What this host remembers of its own disks."""
        return self.root / "run" / OWN / f"{os.uname().nodename}.json"

    def __init__(self, root: Path, engine: Engine) -> None:
        self.root, self.engine, self.calls = root, engine, 0
        (root / "run").mkdir(exist_ok=True)

    def alive(self) -> None:
        self.calls += 1

    def wait(self) -> None:
        """Nobody else works."""

    def check(self) -> int:
        """How often the reading said that it goes on: 0 when nothing was read."""
        self.calls = 0
        loaders = [TokenLoader([(self.root / n, 1.0)], 32, 1) for n in ("train", "validation")]
        try:
            check_data(loaders, self.root / "run", self.engine, self)
        finally:
            for loader in loaders:
                loader.close()
        return self.calls


@pytest.fixture
def reading(tmp_path: Path, config: RunConfig, engine: Engine) -> Reading:
    return Reading(tmp_path, engine)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_each_shard_is_read_once_and_remembered(reading, tmp_path):
    shards = len(list(tmp_path.glob("*/*.bin")))
    assert shards > 2
    assert reading.check() >= 2 * shards
    assert len(json.loads(reading.memory.read_text())) == shards
    assert reading.check() == 0


@pytest.mark.parametrize("text", ["", "{", "3", "null", '[["x"]]', '{"a": 1}'])
def test_a_memory_that_cannot_be_read_only_costs_time(reading, tmp_path, text):
    reading.memory.parent.mkdir()
    reading.memory.write_text(text)
    (tmp_path / "run" / MEMORY).write_text(text)
    assert reading.check() > 0
    assert reading.check() == 0


def test_only_what_changed_is_read_again(reading, tmp_path):
    whole = reading.check()
    path = sorted(tmp_path.glob("train/*.bin"))[0]
    os.utime(path, ns=(1, 1))
    assert 0 < reading.check() < whole
    assert reading.check() == 0


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_every_damaged_shard_is_named_and_none_remembered(reading, tmp_path, ending):
    paths = sorted(tmp_path.glob(f"train/*.{ending}"))[:2]
    other = sorted(tmp_path.glob(f"validation/*.{ending}"))[0]
    for path in [*paths, other]:
        flip(path)
    with pytest.raises(DamageError) as caught:
        reading.check()
    lines = str(caught.value).splitlines()
    assert lines[0] == "damaged shards:" and len(lines) == 5
    for path, line in zip([*paths, other], lines[1:4], strict=True):
        assert str(path) in line and "damaged" in line
    assert "prepare the corpus again, or restore the files from a copy" in lines[4]
    assert not reading.memory.exists()


def test_a_copy_with_the_times_of_its_original_is_read(reading, tmp_path):
    reading.check()
    path = sorted(tmp_path.glob("train/*.bin"))[0]
    times = path.stat()
    flip(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(DamageError, match=path.name):
        reading.check()


def shares(*volumes: str) -> list[list[int]]:
    """Numbers of the shards that each rank reads, of eight; two ranks a host, one folder."""
    places = _places([(f"host{rank // 2}", [volume]) for rank, volume in enumerate(volumes)])
    assert {own[0].everywhere for own in places} == {len(set(volumes)) == 1}
    return [[n for n in range(8) if n % own[0].sharing == own[0].number] for own in places]


def test_every_host_reads_its_own_copy_and_all_together_what_they_share():
    assert shares("nfs a", "nfs a", "nfs a", "nfs a") == [[0, 4], [1, 5], [2, 6], [3, 7]]
    even, odd = [0, 2, 4, 6], [1, 3, 5, 7]
    assert shares("host0 1", "host0 1", "host1 1", "host1 1") == [even, odd, even, odd]
    # One host has a copy, the others do not.
    assert shares("nfs a", "nfs a", "host1 1", "host1 1") == [even, odd, even, odd]


MOUNTS = """\
21 1 8:1 / / rw - ext4 /dev/sda1 rw
30 21 0:50 / /data rw - nfs4 server:/export/my\\040data rw
31 30 0:51 / {data} rw master:1 - lustre 10.0.0.1@o2ib:/fs rw
nonsense
32 21 7:0 /sub {image} ro - squashfs /dev/loop0 ro
"""


def test_only_network_file_systems_have_one_name_on_all_hosts(tmp_path, monkeypatch):
    data, image = tmp_path / "my data", tmp_path / "image"
    for folder in (data / "web", image):
        folder.mkdir(parents=True)
    text = MOUNTS.format(data=str(data).replace(" ", "\\040"), image=image)
    (tmp_path / "mounts").write_text(text)
    monkeypatch.setattr(volume, "MOUNTS", tmp_path / "mounts")
    assert volume_of(data / "web") == "lustre 10.0.0.1@o2ib:/fs /"
    host = os.uname().nodename
    assert volume_of(image).startswith(f"{host} ") and volume_of(tmp_path).startswith(f"{host} ")
    monkeypatch.setattr(volume, "MOUNTS", tmp_path / "none")
    assert volume_of(data).startswith(f"{host} ")


def test_damage_after_the_first_start_is_found_at_the_next(reading, tmp_path):
    reading.check()
    path = sorted(tmp_path.glob("train/*.bin"))[-1]
    flip(path)
    with pytest.raises(DamageError, match=path.name):
        reading.check()


def test_a_corpus_of_another_vocabulary_is_refused(config, tmp_path):
    loader = TokenLoader([(tmp_path / "train", 1.0)], 32, 1)
    check_vocabulary(config, [loader])
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=300))
    with pytest.raises(
        UsageError, match=r"'bytes' has 257 tokens, but model.vocab_size = 300; set"
    ):
        check_vocabulary(other, [loader])
    loader.close()


def test_validation_data_of_another_tokenizer_of_the_same_size_are_refused(config, tmp_path):
    loaders = [TokenLoader([(tmp_path / name, 1.0)], 32, 1) for name in ("train", "validation")]
    check_vocabulary(config, loaders)
    for fingerprint, sound in (("", True), ("0" * 64, False)):
        edit_manifest(tmp_path / "validation", tokenizer__fingerprint=fingerprint)
        other = [loaders[0], TokenLoader([(tmp_path / "validation", 1.0)], 32, 1)]
        if sound:
            check_vocabulary(config, other)
            continue
        with pytest.raises(UsageError, match=r"validation: its tokenizer 'bytes' is not that of "):
            check_vocabulary(config, other)


def test_an_evaluation_is_whole_increments_of_the_batch(config):
    # 256 tokens of increment are 8 sequences of 32; the run file asks for 2 batches of them.
    assert evaluation_samples(config, 1000) == 16
    assert evaluation_samples(config, 9) == 8
    assert evaluation_samples(config, 3) == 8


# A collective may last SHORT seconds; rank 1 reads its share from storage so slow that it takes
# twice as long. Then the same with ranks that go on at once to where the others are waited for.
SLOW = """
import os, sys, time
from datetime import timedelta
from pathlib import Path
import torch.distributed as dist
from megagpt.cluster import process as group
from megagpt.cluster.ranks import discover
from megagpt.config import load_run
from megagpt.engine import build_engine
from megagpt.order.loader import training_loader
from megagpt.plan.ds_config import read_ds_config, resolve
from megagpt.plan.layout import layout_of
from megagpt.run.inputs import check_data

SHORT = 3.0
config, ranks, run = load_run(sys.argv[1]), discover(os.environ), Path(sys.argv[2])
group.prepare_environment(ranks, os.environ)
group.join(ranks)
layout = layout_of(config, 2)
engine = build_engine(config, layout, ranks, resolve(config, layout, read_ds_config("zero1")))
loader = training_loader(config)
dist.barrier()
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=SHORT), dist.group.WORLD)
slow = ranks.rank == 1

def opening(event, arguments):
    global slow
    if event == "open" and slow and str(arguments[0]).endswith(".bin"):
        slow = False
        time.sleep(2 * SHORT)

sys.addaudithook(opening)
check_data([loader], run, engine, group.long_work(lambda: None))
assert not slow
dist.barrier()
print("whole", flush=True)

class Hurried:
    def alive(self):
        pass
    def wait(self):
        pass

slow = ranks.rank == 1
try:
    check_data([loader], run / "again", engine, Hurried())
except RuntimeError as error:
    print("ended", "imed out" in str(error), flush=True)
os._exit(0)
"""


def test_reading_may_take_one_rank_longer_than_a_collective_lasts(tmp_path):
    file = run_file(tmp_path, model={"n_layer": 1})
    (tmp_path / "run").mkdir()
    environ = environment() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    line = [sys.executable, "-c", SLOW, str(file), str(tmp_path / "run")]
    processes = [
        subprocess.Popen(
            line,
            env=environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=200)[0].split("\n") for process in processes]
    assert all("whole" in lines for lines in said)
    assert "ended True" in said[0]

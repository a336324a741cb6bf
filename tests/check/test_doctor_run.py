"""What the doctor says of a run: its checkpoints, its memory, its layout and its shards."""

import shutil

from megagpt.check import run_file as checks
from megagpt.check.findings import FAIL, OK, WARN, Order
from megagpt.check.machine import Gpu
from megagpt.checkpoint import list_checkpoints
from megagpt.config import load_run
from megagpt.plan.disk import checkpoint_bytes, checkpoints_kept
from megagpt.plan.layout import Layout, padded_model
from tests.check.test_doctor import H100
from tests.lib.corpus import edit_manifest, run_file
from tests.lib.distributed import undisturbed


def test_a_checkpoint_is_as_large_as_was_planned():
    config = load_run(undisturbed() / "run.toml")
    files = list_checkpoints(undisturbed() / "run")[-1].glob("*.safetensors")
    size = sum(path.stat().st_size for path in files)
    assert 0 <= size - checkpoint_bytes(padded_model(config, Layout(world=2))) < 0.1 * size


def test_checkpoints_that_lie_there_at_once(tmp_path):
    config = load_run(run_file(tmp_path), ["checkpoint.keep_last=3"])
    assert checkpoints_kept(config) == 4
    config = load_run(
        tmp_path / "run.toml", ["checkpoint.keep_last=3", "checkpoint.keep_every_tokens=4096"]
    )
    assert checkpoints_kept(config) == 4 + config.schedule.end_tokens // 4096


def test_a_disk_that_is_too_small(tmp_path):
    path = run_file(tmp_path)
    config = load_run(path, ["model.n_layer=96", "model.d_model=12288", "model.n_head=96"])
    count = 10**6
    config = load_run(
        path, ["model.n_layer=96", "model.d_model=12288", f"checkpoint.keep_last={count}"]
    )
    found = checks.check_disk(config)
    assert found.status == FAIL
    assert f"needed: {count + 1} checkpoints of 2.0" in found.detail
    assert "lower checkpoint.keep_last" in found.remedy


def test_checkpoints_that_are_there_already_need_no_more_room():
    config = load_run(undisturbed() / "run.toml")
    assert "less" in checks.check_disk(config).detail


def test_what_a_user_keeps_beside_them_makes_no_room(tmp_path):
    shutil.copytree(undisturbed() / "run", tmp_path / "run")
    config = load_run(undisturbed() / "run.toml", [f'output="{tmp_path}/run"'])

    def told() -> str:
        return checks.check_disk(config).detail.partition("needed:")[2]

    before, newest = told(), list_checkpoints(tmp_path / "run")[-1]
    for name in ("step_best", "step_99999999", f"{newest.name}.damaged1", "step_00000099.tmp"):
        shutil.copytree(newest, newest.with_name(name))
    newest.with_name("step_00000098").symlink_to(newest)
    assert told() == before


def test_memory(tmp_path):
    path = run_file(tmp_path)
    config = load_run(path)
    size = checkpoint_bytes(config.model)
    assert checks.check_memory(config, Order(ranks=4, ranks_here=2), size // 2).status == OK
    found = checks.check_memory(config, Order(ranks=4, ranks_here=2), size // 2 - 1)
    assert found.status == FAIL and "checkpoint.background = false" in found.remedy
    alone = load_run(path, ["checkpoint.background=false"])
    assert checks.check_memory(alone, Order(), 1).status == OK


def test_weights_to_start_from(tmp_path):
    file = run_file(tmp_path)
    assert list(checks.check_start_weights(load_run(file))) == []
    config = load_run(file, [f"init_from={tmp_path / 'weights'}"])
    [found] = checks.check_start_weights(config)
    assert found.status == FAIL and "weights is not there" in found.detail
    assert found.remedy == "copy the weights there, or correct init_from"
    (tmp_path / "weights").mkdir()
    [found] = checks.check_start_weights(config)
    assert found.status == OK
    # A run that has saved never reads them again.
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    assert list(checks.check_start_weights(config)) == [found]
    (folder / "step_00000001").mkdir()
    assert list(checks.check_start_weights(config)) == []


def test_layout(tmp_path):
    path = run_file(tmp_path)
    config = load_run(path)
    assert checks.check_layout(config, Order(ranks=2, ranks_here=2)).detail == "2 ranks = data 2"
    wrong = checks.check_layout(config, Order(ranks=3, ranks_here=3))
    assert wrong.status == FAIL and "must be a multiple of the 3 data ranks" in wrong.detail
    split = load_run(path, ["parallel.tensor=2", "parallel.ds_config=pipeline"])
    across = checks.check_layout(split, Order(hosts=2, ranks=2, ranks_here=1))
    assert across.status == WARN and "does not divide the 1 ranks of a host" in across.detail


def test_precision():
    assert checks.check_precision("fp16", []).detail == "parallel.dtype = 'fp16' needs a GPU"
    v100 = Gpu(name="Tesla V100-SXM2-32GB", memory_mib=32768, errors=0)
    assert "Tesla V100-SXM2-32GB has no bf16" in checks.check_precision("bf16", [v100]).detail
    assert checks.check_precision("bf16", [H100]).status == OK
    assert checks.check_precision("fp16", [v100]).status == OK


def shard_rows(path, *overrides, full=False):
    return list(checks.check_shards(load_run(path, overrides), full))


def test_shards_that_are_not_whole(tmp_path):
    path = run_file(tmp_path)
    assert [one.status for one in shard_rows(path, full=True)] == [OK, OK]
    shard = next((tmp_path / "train").glob("*.bin"))
    content = bytearray(shard.read_bytes())
    content[1000] ^= 1
    shard.write_bytes(content)
    assert [one.status for one in shard_rows(path)] == [OK, OK]
    assert "damaged" in shard_rows(path, full=True)[0].detail
    shard.write_bytes(content[:-2])
    assert f"{shard}" in shard_rows(path)[0].detail
    shard.unlink()
    assert f"{shard}: missing" in shard_rows(path)[0].detail
    index = next((tmp_path / "validation").glob("*.idx"))
    index.unlink()
    assert shard_rows(path)[1].detail == f"{index}: No such file"


def test_a_shard_that_cannot_be_read(tmp_path):
    path = run_file(tmp_path)
    index = next((tmp_path / "train").glob("*.idx"))
    index.unlink()
    index.mkdir()
    found = shard_rows(path, full=True)[0]
    assert found.status == FAIL and f"Is a directory: '{index}'" in found.detail


def test_shards_of_another_vocabulary(tmp_path):
    found = shard_rows(run_file(tmp_path), "model.vocab_size=300")[0]
    assert found.status == FAIL and found.detail == (
        f"{tmp_path}/train: its tokenizer 'bytes' has 257 tokens, but model.vocab_size = 300; set "
        "model.vocab_size = 257, or prepare the corpus with the model's tokenizer"
    )


def test_shards_of_another_tokenizer_that_is_as_large(tmp_path):
    path = run_file(tmp_path)
    edit_manifest(tmp_path / "validation", tokenizer__fingerprint="0" * 64)
    training, validation = shard_rows(path)
    assert training.status == OK and validation.status == FAIL
    assert "though as large; prepare the corpus with the tokenizer of" in validation.detail


def test_shards_of_texts_for_a_model_of_images(tmp_path):
    overrides = ['model.family="igpt"', 'model.attention=["dense"]']
    found = shard_rows(run_file(tmp_path), *overrides)[0]
    assert found.status == FAIL and "data_prep/images.py" in found.detail

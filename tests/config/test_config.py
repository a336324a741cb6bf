"""The run file: precedence, every problem at once, and a lossless round trip."""

import re

import pytest

from megagpt.config import DataSource, dump_run, load_run, parse_run
from megagpt.config.other_trainers import HERE
from megagpt.errors import UsageError

RUN = """
model = "gpt3-125m"
seed = 7
output = "runs/x"

[model]
n_layer = 2

[data]
train = [{ path = "data/web", weight = 0.82 }, { path = "data/books", weight = 0.18 }]

[schedule]
total_tokens = 3e9

[parallel]
ds_config = "zero1"
"""


def problems_of(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UsageError) as caught:
        parse_run(text, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()[1:]


def test_preset_then_file_then_override():
    config = parse_run(RUN, ["schedule.peak_lr=1e-3", "model.n_layer=4", "output=/tmp/a b"])
    assert config.model.d_model == 768  # preset
    assert config.model.n_layer == 4  # override over file
    assert config.seed == 7  # file
    assert config.schedule.total_tokens == 3_000_000_000  # a whole float is a count
    assert config.schedule.batch_tokens == 524_288
    assert config.schedule.peak_lr == 1e-3
    assert config.output == "/tmp/a b"
    assert config.data.train[0] == DataSource(path="data/web", weight=0.82)


def test_the_models_name_may_be_overridden_and_spelt_preset():
    assert parse_run(RUN, ["model=gpt3-350m"]).model.d_model == 1024
    assert parse_run(RUN.replace('model = "', 'preset = "')) == parse_run(RUN)


def test_dump_reads_back_to_the_same():
    config = parse_run(RUN, ['output=quote " and \\ and \u00e9'])
    assert parse_run(dump_run(config)) == config


def test_a_model_without_a_preset():
    text = RUN.replace('model = "gpt3-125m"', "")
    found = problems_of(text)
    missing = "  - missing key 'model.d_model': the run file must say it"
    assert f"{missing} (Width of the residual stream)" in found
    sizes = [f"model.{k}={v}" for k, v in (("n_head", 2), ("d_model", 8), ("n_ctx", 16))]
    rates = ["schedule.peak_lr=1.0", "schedule.batch_tokens=32"]
    assert parse_run(text, sizes + rates).model.n_head == 2


def test_unknown_keys_offer_the_nearest():
    assert "unknown key 'modle' (did you mean 'model'?)" in problems_of(RUN, "modle=x")[0]
    found = problems_of(RUN, "schedule.peek_lr=1", "log.tensorbord=true", "parallel.qqqq=1")
    assert any("'schedule.peek_lr' (did you mean 'peak_lr'?)" in p for p in found)
    assert any("'log.tensorbord' (did you mean 'tensorboard'?)" in p for p in found)
    assert any("'parallel.qqqq'; known: compile" in p for p in found)


def test_every_problem_is_reported_at_once():
    """First every value by itself, then, once all are sound, the rules between them."""
    alone = problems_of(
        RUN,
        "model.dropout=1.0",
        "schedule.warmup_tokens=-1",
        "parallel.dtype=fp8",
        "checkpoint.keep_last=0",
        'model.attention=["sparse"]',
    )
    between = problems_of(
        RUN,
        "model.n_head=5",
        "schedule.batch_tokens=1000",
        'data.train=[{path="x", weight=0}]',
    )
    assert len(alone) == 5
    text = "\n".join(alone + between)
    for part in (
        "model.d_model = 768: must be a multiple of n_head (5)",
        "model.dropout = 1: must be less than 1 (Probability of dropping an element of",
        "schedule.warmup_tokens = -1: must be 0 or more",
        "parallel.dtype = 'fp8': must be one of bf16, fp16, fp32",
        "checkpoint.keep_last = 0: must be 1 or more",
        "schedule.batch_tokens = 1000: must be a multiple of model.n_ctx (2048)",
        "data.train: weight = 0.0 of x: must be above 0",
        "model.attention[0] = 'sparse': must be one of dense, banded (Attention of each layer",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=x", "seed = 'x': must be a whole number"),
        ("seed=1.5", "seed = 1.5: must be a whole number"),
        ("output=3", "output = 3: must be text"),
        ("log.tensorboard=1", "log.tensorboard = 1: must be true or false"),
        ("schedule.peak_lr=high", "schedule.peak_lr = 'high': must be a number"),
        ("data.train=3", "data.train = 3: must be a list"),
        (
            "data.train=data/mine",
            "data.train = 'data/mine': must be a list, as \"data.train=[{path='DIR'}]\" (Corpora",
        ),
        (
            "data.validation=['a']",
            "[0] = 'a': must be a table of keys, as \"data.validation=[{path='DIR'}]\"",
        ),
        ("data.train=[3]", "data.train[0] = 3: must be a table of keys"),
        ("optimizer.betas=[0.9]", "optimizer.betas = [0.9]: must be a list of 2 values"),
        ("parallel=3", "parallel = 3: must be a table of keys"),
        ("data.train=[]", "data.train = []: must be a list of at least 1 value (Corpora that"),
        ("optimizer.betas=[0.9,1.5]", "optimizer.betas[1] = 1.5: must be less than 1 (Decay rates"),
        ("optimizer.betas=[1,1,1]", "optimizer.betas = [1, 1, 1]: must be a list of 2 values"),
        (
            "optimizer.gradient_clipping=inf",
            "must be a finite number (Largest global gradient norm",
        ),
        ("schedule.peak_lr=2000-01-01", "peak_lr = datetime.date(2000, 1, 1): must be a number"),
        ("output=", "output = '': must be text of at least 1 character (The run folder;"),
        ("output=\udcff", "override 'output=\\udcff': must be UTF-8"),
        ("model=[1]", "preset = [1]: must be text (A row of presets.py"),
        ("model=gpt3-125", "no such preset (did you mean 'gpt3-125m'?)"),
        ("model.family=gpt4", "'gpt4': must be one of gpt2, gpt1, igpt (gpt2 (GPT-2 and GPT-3),"),
        ("just-text", "override 'just-text': must be section.key=value"),
        ("seed.x=1", "override 'seed.x=1': seed is not a section"),
    ],
)
def test_wrong_values_name_key_value_and_rule(override, message):
    assert any(message in problem for problem in problems_of(RUN, override))


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UsageError, match=r"none.toml: cannot read the run file \(No such file"):
        load_run(tmp_path / "none.toml")
    (tmp_path / "broken.toml").write_text("seed = \n")
    with pytest.raises(UsageError, match=r"broken.toml: not valid TOML: Invalid value \(at line 1"):
        load_run(tmp_path / "broken.toml")
    (tmp_path / "latin.toml").write_bytes(b'output = "\xe9"\n')
    with pytest.raises(UsageError, match=r"latin.toml: not valid TOML: not UTF-8 \("):
        load_run(tmp_path / "latin.toml")


def test_files_that_are_more_than_a_run_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbf" + RUN.replace("\n", "\r\n").encode())
    assert load_run(path) == parse_run(RUN)
    for text, message in (
        ("seed = " + "9" * 5000, r"not valid TOML: Exceeds the limit \(4300 digits\)"),
        ("a = " + "[" * 9999, "not valid TOML: lists or tables are nested too deeply"),
        ("[" + "a." * 2000 + "b]", "tables are nested too deeply: no key has so many sections"),
        (RUN + "#" * 2**20, "larger than 1,048,576 bytes, so it is no run file"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            load_run(path)
    with pytest.raises(UsageError, match=r"cannot read the run file \(Is a directory\)"):
        load_run(tmp_path)


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 400, "1e400", "nan", "9" * 5000])
def test_numbers_that_no_machine_holds(number):
    for key in ("seed", "schedule.peak_lr", "optimizer.betas", "log.profile_steps", "output"):
        [problem] = problems_of(RUN, f"{key}={number}") if key != "output" else [f"{key} = "]
        assert f"{key} = " in problem or f"{key}[" in problem
        assert len(problem) < 400


# --- keys of other trainers, and refusals that say what would do ---------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=1", "unknown key 'learning_rate': say it as schedule.peak_lr"),
        ("lr=1", "unknown key 'lr': say it as schedule.peak_lr"),
        ("max_iters=1", "schedule.total_tokens, in tokens: steps x schedule.batch_tokens"),
        ("model.block_size=1", "unknown key 'model.block_size': say it as model.n_ctx, in tokens"),
        ("model.n_embd=1", "unknown key 'model.n_embd': say it as model.d_model"),
        ("schedule.batch_size=1", "schedule.batch_tokens, in tokens over all ranks: sequences x"),
        (
            "gradient_accumulation_steps=8",
            "unknown key 'gradient_accumulation_steps': leave it out; it follows",
        ),
        ("parallel.zero_stage=1", "say it as parallel.ds_config"),
        ("num_gpus=8", "unknown key 'num_gpus': leave it out; ranks are the launcher's: megagpt"),
        ("device='cuda'", "unknown key 'device': leave it out; each rank takes a GPU of its host"),
        ("ctx_len=128", "unknown key 'ctx_len': say it as model.n_ctx, in tokens"),
        ("optimizer.lr=1", "unknown key 'optimizer.lr': say it as schedule.peak_lr"),
        ("peak_lr=1", "unknown key 'peak_lr': it belongs to [schedule], schedule.peak_lr"),
        ("model.micro_batch=1", "it belongs to [parallel], parallel.micro_batch"),
        ("schedule.seed=1", "unknown key 'schedule.seed': it belongs above the first table"),
    ],
)
def test_keys_that_people_bring(override, message):
    [problem] = problems_of(RUN, override)
    assert message in problem


def test_what_other_trainers_say_leads_to_keys_that_exist():
    config = parse_run(RUN)
    for name, here in HERE.items():
        for key in re.findall(r"\b(?:[a-z]+\.)+[a-z_]+|^output", here):
            at = config
            for step in key.split("."):
                at = getattr(at, step)
        assert not hasattr(config, name), name
    assert len(HERE) > 60


def test_a_wrong_preset_is_one_problem():
    text = RUN.replace("[model]\nn_layer = 2\n", "")
    [problem] = problems_of(text, "model=gpt3-125")
    assert "no such preset (did you mean 'gpt3-125m'?)" in problem
    [problem] = problems_of(text.replace('model = "gpt3-125m"', "").partition("[schedule]")[0])
    assert "model is missing: name a preset (gpt3-125m," in problem
    # What else is wrong is said with it.
    assert len(problems_of(text, "model=gpt3-125", "sead=1")) == 2


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["schedule.batch_tokens=100000"], ["use 98304 or 131072"]),
        (
            ["schedule.batch_tokens=100000", "schedule.ramp_start_tokens=0"],
            ["(2048), the tokens of one sequence; use 98304 or 100352"],
        ),
        # A first batch of 32,768: the increment alone is wrong, and so are all that divide neither.
        (
            ["schedule.ramp_increment_tokens=4096", "schedule.batch_tokens=38912"],
            ["tokens = 4096: must be a multiple of model.n_ctx (2048) that divides batch_tokens "]
            + ["grows in steps of it; use 2048 or 38912; or batch_tokens = 36864 or 40960"],
        ),
        (
            ["schedule.ramp_start_tokens=40960", "schedule.ramp_increment_tokens=16384"],
            ["must be a multiple of ramp_increment_tokens (16384), in which the batch grows; use "]
            + ["use 32768 or 49152"],
        ),
        (["schedule.ramp_start_tokens=100000"], ["use 65536 or 131072"]),
        (["schedule.ramp_start_tokens=49152"], ["use 32768 or 65536; or batch_tokens = 491520 or"]),
        (["schedule.ramp_start_tokens=600000000"], ["in steps of it; use 524288"]),
        (["schedule.batch_tokens=9223372036854775807"], ["(32768), in which the batch grows"]),
    ],
)
def test_refusals_speak_of_keys_that_are_there_and_solve(overrides, messages):
    found = problems_of(RUN, *overrides)
    assert len(found) == 1 and all(message in found[0] for message in messages), found
    assert ("ramp" in found[0]) == ("schedule.ramp_start_tokens=0" not in overrides)

"""Every key of a run file, whatever is added: what fits its bounds comes back from the text as it
went in, and what no run can mean is refused with the key's name.

The keys, their types and bounds are read from the dataclasses, so that a new key is tested by
being there.
"""

import dataclasses
import datetime
import math
import re
import typing
from collections.abc import Iterator
from typing import Any

import pytest
import tomli_w
from annotated_types import Ge, Gt, Interval, Le, Lt, MinLen, Predicate
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import RunConfig, dump_run, load_run, parse_run
from megagpt.config.presets import ModelConfig
from megagpt.config.schedule import Schedule
from megagpt.config.sections import DataConfig, DataSource, LogConfig, MixtureChange
from megagpt.errors import UsageError

SOUND = {
    "output": "x",
    "model": {"n_layer": 2, "n_head": 2, "d_model": 8, "n_ctx": 16},
    "schedule": {"total_tokens": 64, "peak_lr": 1.0, "batch_tokens": 32},
    "data": {
        "train": [{"path": "a"}],
        "validation": [{"path": "b"}],
        "changes": [{"at_tokens": 32, "weights": [2]}],
    },
}


def leaves(cls: type = RunConfig, before: tuple[str | int, ...] = ()) -> Iterator[tuple]:
    """(path, type) of every key; of a list of tables, the keys of its first table."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if name.startswith("__"):
            continue
        path, bare = (*before, name), stripped(hint)
        yield path, hint
        if dataclasses.is_dataclass(bare):
            yield from leaves(bare, path)
        elif typing.get_origin(bare) is tuple:
            inner = typing.get_args(bare)[0]
            if dataclasses.is_dataclass(inner):
                yield from leaves(inner, (*path, 0))


def stripped(hint: Any) -> Any:
    """The type without its bounds."""
    return hint.__origin__ if hasattr(hint, "__metadata__") else hint


def metadata(hint: Any) -> list[Any]:
    """The bounds of a key, an Interval taken apart."""
    bounds = getattr(hint, "__metadata__", ())
    return [bound for b in bounds for bound in (b if isinstance(b, Interval) else [b])]


KEYS = dict(leaves())


def label(path: tuple[str | int, ...]) -> str:
    return "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in path)[1:]


def beyond(bound: Any) -> Iterator[int]:
    """Whole numbers outside a bound, the nearest first."""
    for step in (1, 1000, 2**70):
        match bound:
            case Ge():
                yield bound.ge - step
            case Gt():
                yield bound.gt + 1 - step
            case Le():
                yield int(bound.le) + step
            case Lt():
                yield bound.lt - 1 + step


def impossible(hint: Any) -> Iterator[Any]:
    """Values that no run can mean by a key of type `hint`."""
    bare, bounds = stripped(hint), metadata(hint)
    kind = typing.get_origin(bare) or bare
    yield from WRONG["table" if dataclasses.is_dataclass(bare) else kind]
    yield from (value for bound in bounds for value in beyond(bound))
    if kind is tuple and typing.get_args(bare)[-1] is not Ellipsis:
        yield from ([], [0.5], [0.5] * 3)
    if kind is tuple:
        rest = [0.5] * (len(typing.get_args(bare)) - 1)
        yield from ([value, *rest] for value in impossible(typing.get_args(bare)[0]))
    if any(isinstance(bound, MinLen) for bound in bounds):
        yield "" if kind is str else []
    if any(isinstance(bound, Predicate) for bound in bounds):
        yield from ("two\nlines", "a\x00b", "\x1b[2J", "tab\t", "\x7f", "\x85")


WRONG: dict[Any, tuple] = {
    int: (True, "1", [], {}, math.nan, math.inf, -math.inf, 1.5, 2**63, -(2**63) - 1, 1e300, -1),
    float: (True, False, "1", [], {}, math.nan, math.inf, -math.inf, 10**400),
    bool: (0, 1, 1.0, "true", "", [], {}),
    str: (0, True, 1.5, [], {}, ["x"], datetime.date(2000, 1, 1)),
    typing.Literal: ("", "x", 2, -1, 0.5, [], ["none"]),
    tuple: (0, True, "text", {}, [[]]),
    "table": (0, True, "text", [], [{}]),
}
"""Values of a wrong type, and numbers that no key's type has; a new type needs a row."""


def with_value(path: tuple[str | int, ...], value: Any, tree: Any = SOUND) -> Any:
    """The tree of a run file that says `value` at a key."""
    if not path:
        return value
    if isinstance(path[0], int):
        return [with_value(path[1:], value, tree[path[0]])]
    return {**tree, path[0]: with_value(path[1:], value, tree.get(path[0], {}))}


def test_the_sound_run_is_sound_and_every_key_is_met():
    assert parse_run(tomli_w.dumps(SOUND)).data.train[0].path == "a"
    assert ("optimizer", "gradient_clipping") in KEYS and ("data", "train", 0, "path") in KEYS
    assert len(KEYS) > 60


@pytest.mark.parametrize("path", KEYS, ids=label)
def test_what_no_run_can_mean_is_refused_with_the_keys_name(path):
    key = label(path)
    for value in impossible(KEYS[path]):
        text = tomli_w.dumps(with_value(path, value))
        try:
            parse_run(text)
        except UsageError as refusal:
            problems = str(refusal).splitlines()[1:]
            # The key's own name opens the problem, or that of a value within it.
            assert any(re.search(f"- (missing key ')?{re.escape(key)}", p) for p in problems), value
        else:
            pytest.fail(f"{key} = {value!r} was taken")


@st.composite
def runs(draw: st.DrawFn) -> RunConfig:
    """Configurations that keep every bound; keys that are tied to others are drawn after them."""
    model = draw(st.from_type(ModelConfig))
    heads = draw(st.integers(1, 128))
    parts = draw(st.integers(1, 8)) if model.classes and model.family != "igpt" else 1
    classes = (
        0 if model.family == "igpt" else max(model.classes, 2) if parts == 1 else model.classes
    )
    model = dataclasses.replace(
        model,
        n_head=heads,
        d_model=heads * draw(st.integers(1, 256)),
        n_ctx=parts * draw(st.integers(1, 10**6)),
        classes=classes if model.classes else 0,
        parts=parts,
    )
    increment = model.n_ctx * draw(st.integers(1, 1000))
    start = increment * draw(st.integers(1, 1000))
    schedule = dataclasses.replace(
        draw(st.from_type(Schedule)),
        ramp_increment_tokens=increment,
        ramp_start_tokens=start,
        batch_tokens=start + increment * draw(st.integers(0, 1000)),
        warmup_tokens=0,
    )
    sources = draw(st.lists(st.from_type(DataSource), min_size=1, max_size=4))
    positive = st.floats(0, exclude_min=True, allow_infinity=False)
    sources = [dataclasses.replace(source, weight=draw(positive)) for source in sources]
    begins = draw(st.lists(st.integers(1, 10**6), max_size=3, unique=True))
    weights = st.lists(positive, min_size=len(sources), max_size=len(sources))
    changes = [
        MixtureChange(at_tokens=begin * model.n_ctx, weights=tuple(draw(weights)))
        for begin in sorted(begins)
    ]
    data = DataConfig(
        train=tuple(sources),
        validation=tuple(sources[1:]),
        changes=tuple(changes),
        verify=draw(st.booleans()),
    )
    first = draw(st.integers(1, 1000))
    log = dataclasses.replace(
        draw(st.from_type(LogConfig)),
        profile_steps=draw(st.sampled_from([(), (first, first + 3)])),
    )
    names = {f.name: f.type for f in dataclasses.fields(RunConfig)}
    hints = typing.get_type_hints(RunConfig, include_extras=True)
    tied = {"preset": "", "model": model, "data": data, "schedule": schedule, "log": log}
    return RunConfig(**{n: tied[n] if n in tied else draw(st.from_type(hints[n])) for n in names})


# What the bounds do not say key by key: every number is finite, and text is UTF-8.
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))


@settings(max_examples=150, deadline=None)
@given(runs())
def test_a_run_comes_back_from_its_text_as_it_was(config):
    assert parse_run(dump_run(config)) == config


def test_what_a_file_holds_is_what_was_dumped(tmp_path):
    prompt = 'line\nend\r\n\ttab \x7f \u2028 " \\ \U0001f600 # [x]'
    config = parse_run(tomli_w.dumps({**SOUND, "evaluate": {"prompt": prompt}}))
    assert config.evaluate.prompt == prompt
    (tmp_path / "run.toml").write_text(dump_run(config), encoding="utf-8")
    assert load_run(tmp_path / "run.toml") == config

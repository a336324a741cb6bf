"""From the text of a run file to a RunConfig, with every problem said at once (L0)."""

import dataclasses
import difflib
import re
import tomllib
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megagpt.config.presets import PRESETS
from megagpt.config.rules import problems_of
from megagpt.config.sections import RunConfig
from megagpt.errors import UsageError


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and applies `section.key=value` overrides.

    Raises UsageError that lists every problem: a missing or broken file, unknown keys with the
    nearest known ones, values of a wrong type, values that no run can have.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the run file ({error.strerror}); give the path of a .toml file, "
            "for example launch/runs/quickstart.toml"
        ) from None
    return parse_run(text, overrides, name=str(path))


def parse_run(text: str, overrides: Sequence[str] = (), name: str = "run file") -> RunConfig:
    """The same for the text of a run file; `name` stands for it in messages."""
    # Only the part above the first table can hold the top-level line `model = ...`.
    table = re.search(r"(?m)^\s*\[", text)
    end = table.start() if table else len(text)
    head = re.sub(r"(?m)^model(\s*=)", r"preset\1", text[:end])
    try:
        tree = tomllib.loads(head + text[end:])
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: not valid TOML: {error}") from None
    problems: list[str] = []
    for override in overrides:
        _override(tree, override, problems)
    _add_preset(tree, problems)
    config = _build(RunConfig, tree, "", problems)
    # Rules between values are only worth reading once every value is of its type.
    if config is not None and not problems:
        problems = list(problems_of(config))
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UsageError(f"{name}: {count}\n" + "\n".join(f"  - {p}" for p in problems))
    assert isinstance(config, RunConfig)
    return config


def _override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Applies one `section.key=value` to the tree; the value is read as TOML, else as text."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"override {override!r}: must be section.key=value")
        return
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = ("preset" if key == "model" else key).split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            problems.append(f"override {override!r}: {section} is not a section")
            return
    tree[last] = value


def _add_preset(tree: dict[str, Any], problems: list[str]) -> None:
    """Lays the sections of the tree over those of its preset's row."""
    name = tree.get("preset", "")
    if name == "":
        return
    if name not in PRESETS:
        near = _nearest(str(name), PRESETS)
        problems.append(f"model = {name!r}: no such preset{near}; presets: {', '.join(PRESETS)}")
        return
    row = PRESETS[name]
    model = dataclasses.asdict(row.model)
    for section, defaults in (
        ("model", model),
        ("schedule", row.schedule),
        ("optimizer", row.optimizer),
    ):
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section] = {**defaults, **tree[section]}


def _nearest(word: str, known: typing.Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


def _build(cls: type, tree: Any, where: str, problems: list[str]) -> Any:
    """An instance of dataclass `cls` from a table, or None with the reasons added to `problems`."""
    label = where.rstrip(".") or "the run file"
    if not isinstance(tree, dict):
        problems.append(f"{label} = {tree!r}: must be a table of keys")
        return None
    fields = {f.name: f for f in dataclasses.fields(cls)}
    # The synonym under which users know the top-level key.
    known = [*fields, "model"] if cls is RunConfig else list(fields)
    for key in tree.keys() - fields.keys():
        choices = ", ".join(sorted(set(known)))
        problems.append(f"unknown key {where + key!r}{_nearest(key, known)}; known: {choices}")
    hints = typing.get_type_hints(cls)
    before, values = len(problems), {}
    for name, spec in fields.items():
        if name in tree:
            values[name] = _value(hints[name], tree[name], where + name, problems)
        elif dataclasses.is_dataclass(hints[name]) and spec.default_factory is dataclasses.MISSING:
            values[name] = _build(hints[name], {}, f"{where}{name}.", problems)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            problems.append(f"missing key {where + name!r}: the run file must say it")
    return cls(**values) if len(problems) == before else None


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the type `hint`, or None with the reason added to `problems`."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where + ".", problems)  # type: ignore[arg-type]
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            problems.append(f"{where} = {value!r}: must be a list")
            return None
        inner = typing.get_args(hint)
        if inner[-1] is not Ellipsis and len(value) != len(inner):
            problems.append(f"{where} = {value!r}: must be a list of {len(inner)} values")
            return None
        return tuple(_value(inner[0], v, f"{where}[{i}]", problems) for i, v in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if hint is int and type(value) is float and value.is_integer():
        return int(value)
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}[hint]
        problems.append(f"{where} = {value!r}: must be {kind}")
        return None
    return value

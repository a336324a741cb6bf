"""From the text of a run file to a RunConfig, with every problem said at once, and back (L0)."""

import argparse
import difflib
import functools
import json
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tomli_w

from megagpt.config.other_trainers import HERE
from megagpt.config.presets import PRESETS
from megagpt.config.sections import RunConfig
from megagpt.errors import UsageError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

_LARGEST = 1 << 20
"""Bytes of a run file."""
RULES = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "dataclass_type": "a table of keys{form}",
    "tuple_type": "a list{form}",
    "literal_error": "one of {choices}",
    "greater_than": "above {gt:.10g}",
    "greater_than_equal": "{ge:.10g} or more",
    "less_than": "less than {lt:.10g}",
    "less_than_equal": "{le:.10g} or less",
    "predicate_failed": "one line without control characters",
    "string_too_short": "text of at least {min_length} character",
    "too_long": "a list of {length} values",
    "too_short": "a list of at least {min_length} value",
}
"""What a value must be, by the type of pydantic's error; braces are that error's own figures."""


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds the overrides of a run file's keys to a command line, as load_run takes them."""
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="section.key=value", help="override of a key"
    )


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and applies `section.key=value` overrides.

    Raises UsageError that lists every problem: a missing or broken file, unknown keys with the
    nearest known ones, values of a wrong type, values that no run can have.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
        # Editors of Windows begin a file with a mark of its encoding.
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{path}: cannot read the run file ({error.strerror}); give the path of a .toml file, "
            "for example launch/runs/quickstart.toml"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not valid TOML: not UTF-8 ({error})") from None
    if len(content) > _LARGEST:
        raise UsageError(f"{path}: larger than {_LARGEST:,} bytes, so it is no run file")
    return parse_run(text, overrides, name=str(path))


def parse_run(text: str, overrides: Sequence[str] = (), name: str = "run file") -> RunConfig:
    """The same for the text of a run file; `name` stands for it in messages."""
    # Only the part above the first table can hold the top-level line `model = ...`.
    table = re.search(r"(?m)^\s*\[", text)
    end = table.start() if table else len(text)
    head = re.sub(r"(?m)^model(\s*=)", r"preset\1", text[:end])
    try:
        tree = _toml(head + text[end:])
    except ValueError as error:
        raise UsageError(f"{name}: not valid TOML: {error}") from None
    problems: list[str] = []
    for override in overrides:
        _override(tree, override, problems)
    _add_preset(tree, problems)
    config = _validate(tree, problems)
    # Rules between values are only worth reading once every value is sound by itself.
    if config is not None and not problems:
        problems.extend(config.problems())
    if config is None or problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise UsageError(f"{name}: {count}\n" + "\n".join(f"  - {p}" for p in problems))
    return config


def dump_run(config: RunConfig) -> str:
    """The whole configuration as the text of a run file that load_run reads back to the same."""
    return tomli_w.dumps(asdict(config))


def _toml(text: str) -> dict[str, Any]:
    """The tree of a text; raises ValueError for what is no TOML, or more than Python can read."""
    try:
        return tomllib.loads(text, parse_float=_number)
    except RecursionError:
        raise ValueError("lists or tables are nested too deeply") from None


def _number(text: str) -> int | float:
    """A TOML float; a whole one is a count, so that total_tokens = 3e9 can be written."""
    value = float(text)
    return int(value) if value.is_integer() else value


def _override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    """Applies one `section.key=value` to the tree; the value is read as TOML, else as text."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        problems.append(f"override {override!r}: must be section.key=value")
        return
    # Bytes of a command line that are no UTF-8 arrive as lone surrogates.
    if any("\ud800" <= character <= "\udfff" for character in override):
        problems.append(f"override {override!r}: must be UTF-8")
        return
    try:
        value = _toml(f"value = {text}")["value"]
    except ValueError:
        value = text
    *sections, last = ("preset" if key == "model" else key).split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            problems.append(f"override {override!r}: {section} is not a section")
            return
    tree[last] = value


def _add_preset(tree: dict[str, Any], problems: list[str]) -> None:
    """Lays the sections of the tree over those of its preset's row.

    Where the preset is the problem, any row stands in, so that its keys are not missed one by one.
    """
    name = tree.get("preset", "")
    row = PRESETS.get(name) if isinstance(name, str) else None
    if isinstance(name, str) and name and row is None:
        near = _nearest(name, PRESETS)
        problems.append(f"model = {name!r}: no such preset{near}; presets: {', '.join(PRESETS)}")
    elif name == "" and not {"model", "schedule"} & tree.keys():
        problems.append(
            f"model is missing: name a preset ({', '.join(PRESETS)}), or give the tables [model] "
            "and [schedule]"
        )
    if problems and row is None:
        row = next(iter(PRESETS.values()))
    defaults = {
        "model": asdict(row.model) if row else {},
        "schedule": row.schedule if row else {},
        "optimizer": row.optimizer if row else {},
        # Without its table too, a missing key is named.
        "data": {},
    }
    for section, values in defaults.items():
        if isinstance(tree.setdefault(section, {}), dict):
            tree[section] = {**values, **tree[section]}


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean {near[0]!r}?)" if near else ""


@functools.cache
def _adapter() -> "TypeAdapter[RunConfig]":
    # Imported here: 0.1 s of CPU that only a command which reads a run is to pay.
    from pydantic import TypeAdapter

    return TypeAdapter(RunConfig)


def _validate(tree: dict[str, Any], problems: list[str]) -> RunConfig | None:
    """The tree as a RunConfig, or None with the reasons added to `problems`."""
    from pydantic import ValidationError

    try:
        # Through JSON, because pydantic's strict mode takes lists and tables only from there. A
        # date, which JSON has not, becomes null: no key takes either.
        return _adapter().validate_json(json.dumps(tree, default=lambda _: None))
    except RecursionError:
        problems.append("tables are nested too deeply: no key has so many sections")
        return None
    except ValidationError as error:
        schema = _adapter().json_schema()
        for details in error.errors():
            # pydantic counts only the sound values of a list, whose others it names too.
            if details["type"] != "too_short" or not details["input"]:
                problems.append(_problem(details, tree, schema))
        return None


def _unknown(key: str, name: str, known: dict[str, Any], schema: dict[str, Any]) -> str:
    """An unknown key, with what it may have meant: here, in another table, in another trainer."""
    if name in HERE and name not in known:
        verb = "" if HERE[name].startswith("leave it out") else "say it as "
        return f"unknown key {key!r}: {verb}{HERE[name]}"
    for section, node in schema["properties"].items():
        table = schema["$defs"].get(node.get("$ref", "").rpartition("/")[2], {})
        if name in table.get("properties", {}):
            return f"unknown key {key!r}: it belongs to [{section}], {section}.{name}"
    if name in schema["properties"]:
        return f"unknown key {key!r}: it belongs above the first table"
    return f"unknown key {key!r}{_nearest(name, known)}; known: {', '.join(sorted(known))}"


def _problem(error: Mapping[str, Any], tree: Any, schema: dict[str, Any]) -> str:
    """The key, value, rule and meaning of one of pydantic's errors.

    The JSON schema of RunConfig knows each table's keys and each key's sentence.
    """
    kind, steps, figures = error["type"], error["loc"], error.get("ctx", {})
    if kind == "missing" and isinstance(steps[-1], int):
        kind, steps = "too_long", steps[:-1]
    key, value, node, known, sentence = "", tree, schema, {}, ""
    for step in steps:
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        if isinstance(step, int):
            key, value = f"{key}[{step}]", value[step]
            node = node["items"] if "items" in node else node["prefixItems"][step]
        else:
            key, value = f"{key}.{step}" if key else step, value.get(step)
            known = node["properties"]
            node, sentence = known.get(step, {}), ""
        sentence = node.get("description", sentence)
    if kind == "unexpected_keyword_argument":
        return _unknown(key, step, known, schema)
    # The first sentence of the text below the key in sections.py.
    sentence = " ".join(sentence.split()).partition(". ")[0].rstrip(".")
    meaning = f" ({sentence})" if sentence else ""
    if kind == "missing":
        return f"missing key {key!r}: the run file must say it{meaning}"
    figures |= {"choices": ", ".join(json.dumps(c).strip('"') for c in node.get("enum", []))}
    corpora = "DataSource" in node.get("items", node).get("$ref", "")
    form = f", as \"{key.partition('[')[0]}=[{{path='DIR'}}]\"" if corpora else ""
    rule = RULES[kind].format(length=node.get("maxItems"), form=form, **figures)
    return f"{key} = {value!r:.100}: must be {rule}{meaning}"

"""docs/reference/run-file.md is what the code says of every key: type, default, bound, meaning.

After a change of a key, `python tests/config/test_reference.py` writes the page anew.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megagpt.config import load_run
from megagpt.config.parse import _adapter
from megagpt.config.presets import PRESETS

PAGE = Path(__file__).parents[2] / "docs/reference/run-file.md"
EXAMPLE = "gpt3-125m"
"""The preset whose values stand for keys that have no default."""
TEXT = """# Run file: every key

Written from the code by `python tests/config/test_reference.py`; a test compares the two.

A run file is TOML. A key that is not in it takes the value of its preset (`model = "gpt3-125m"`
above the first table, see [models.md](models.md)), and where there is none its default. Any key
can be set on the command line: `schedule.peak_lr=1e-3`. Counts may be written `3e9` or
`3_000_000_000`. An unknown key is refused, with the key that was probably meant.

`megagpt init` writes a run file for a corpus and a machine;
[first-model.md](../tutorials/first-model.md) explains one.
"""
OPENINGS = {
    "": "## Above the first table",
    "data": "## [data]",
    "DataSource": "### An entry of data.train and data.validation",
    "MixtureChange": "### An entry of data.changes",
}


def page() -> str:
    """The whole page."""
    schema = _adapter().json_schema()
    tables = {"": schema["properties"]}
    for section, node in schema["properties"].items():
        if name := _reference(node):
            tables[section] = schema["$defs"][name]["properties"]
            if section == "data":
                for entry in ("DataSource", "MixtureChange"):
                    tables[entry] = schema["$defs"][entry]["properties"]
    required = {"": schema["required"]}
    for name, definition in schema["$defs"].items():
        required[name] = definition.get("required", [])
    parts = [TEXT]
    for section, keys in tables.items():
        needed = required.get(section) or required.get(_reference(tables[""].get(section, {})), [])
        rows = list(_rows(section, keys, needed))
        head = "| key | type | default | bound | meaning |\n|---|---|---|---|---|\n"
        parts.append(f"\n{OPENINGS.get(section, f'## [{section}]')}\n{head}{''.join(rows)}")
    return "".join(parts)


def _reference(node: dict[str, Any]) -> str:
    """The name of the table that a key of the top is; "" for a plain value."""
    return str(node.get("$ref", "")).rpartition("/")[2]


def _rows(section: str, keys: dict[str, Any], needed: list[str]) -> Iterator[str]:
    for name, node in keys.items():
        if _reference(node):
            continue
        meaning = " ".join(node.get("description", "").split()).replace("|", "\\|")
        assert meaning or (section, name) == ("DataSource", "path"), f"{section}.{name}"
        default = _value(node["default"]) if "default" in node else ""
        if name in needed:
            example = _example(section, name)
            default = "required" + (f", such as {example}" if example else "")
        cells = (f"`{name}`", _type(node), default, _bound(node), meaning or "Its folder.")
        yield f"| {' | '.join(cells)} |\n"


def _example(section: str, name: str) -> str:
    row = PRESETS[EXAMPLE]
    value = getattr(row.model, name, None) if section == "model" else row.schedule.get(name)
    return {"output": '`"runs/x"`', "path": '`"data/x"`'}.get(
        name, "" if value is None else _value(value)
    )


def _value(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _type(node: dict[str, Any]) -> str:
    if "enum" in node:
        return " or ".join(_value(choice) for choice in node["enum"])
    if node.get("type") == "array":
        entries = node.get("items") or node["prefixItems"][0]
        kind = "table" if _reference(entries) else _type(entries)
        plural = {"whole number": "whole numbers", "number": "numbers", "table": "tables"}
        return f"list of {plural.get(kind, kind)}"
    names = {"integer": "whole number", "number": "number", "string": "text"}
    return names.get(node["type"], "`true` or `false`")


def _bound(node: dict[str, Any]) -> str:
    if node.get("type") == "array":
        least = node.get("minItems")
        if "maxItems" in node:
            return f"{node['maxItems']} of them"
        return f"{least} or more of them" if least else ""
    found = []
    for key, words in (
        ("minimum", "{} or more"),
        ("exclusiveMinimum", "above {}"),
        ("maximum", "{} or less"),
        ("exclusiveMaximum", "less than {}"),
    ):
        # 2^31 and 2^63 are bounds of the format, not of a run.
        if key in node and abs(node[key]) < 2**31 - 1:
            found.append(words.format(f"{node[key]:g}"))
    return ", ".join(found)


def test_the_page_is_what_the_code_says():
    assert PAGE.read_text(encoding="utf-8") == page()


def test_every_key_of_a_run_is_on_the_page():
    config = load_run(Path(__file__).parents[2] / "launch/runs/quickstart.toml")
    text = page()
    for section in ("model", "schedule", "optimizer", "parallel", "checkpoint", "evaluate", "log"):
        table = text.split(f"\n## [{section}]\n")[1].split("\n## ")[0]
        keys = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
        assert keys == list(type(getattr(config, section)).__dataclass_fields__)
    assert "| `peak_lr` | number | required, such as `0.0006` | above 0 | Learning rate" in text
    assert "| `min_lr_ratio` | number | `0.1` | 0 or more, 1 or less |" in text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

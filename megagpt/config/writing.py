"""A RunConfig as the text of a run file (L0)."""

import dataclasses
import json
from typing import Any

from megagpt.config.sections import RunConfig


def dump_run(config: RunConfig) -> str:
    """The whole configuration as the text of a run file that load_run reads back to the same."""
    tables = dataclasses.asdict(config)
    lines = [f"{k} = {_toml(v)}" for k, v in tables.items() if not isinstance(v, dict)]
    for name, table in tables.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{k} = {_toml(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """One value as TOML. JSON's strings, numbers and booleans are TOML's too."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)

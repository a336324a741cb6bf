"""The text of a run file: every line with what it means, at most twenty of them (L3)."""

from pathlib import Path

import tomli_w
from jinja2 import Environment, StrictUndefined

from megagpt.config.flops import parameters
from megagpt.config.presets import PRESETS
from megagpt.corpus.manifest import CorpusManifest
from megagpt.start.fit import Fitted, round_down

TEMPLATE = Path(__file__).with_name("run.toml.jinja")
COLUMN = 40
"""Where comments begin."""
NOTE = "\0"
"""Stands before a comment in what the template makes: no path or name holds it."""


def run_text(fitted: Fitted, corpus: CorpusManifest, name: str) -> str:
    """The run file, which load_run reads back as fitted.config."""
    config = fitted.config
    made = Environment(trim_blocks=True, undefined=StrictUndefined, keep_trailing_newline=True)
    made.filters |= {"toml": quoted, "digits": "{:_}".format}
    text = made.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        note=NOTE,
        name=name,
        fitted=fitted,
        config=config,
        model=config.model,
        schedule=config.schedule,
        parallel=config.parallel,
        preset=PRESETS.get(fitted.size),
        parameters=parameters(config.model),
        tokenizer=corpus.tokenizer_name,
        every=max(config.schedule.batch_tokens, round_down(config.schedule.total_tokens / 10)),
        data=[("train", config.data.train), ("validation", config.data.validation)],
    )
    lines = (line.partition(NOTE) for line in text.removesuffix("\n").split("\n"))
    return "".join(
        (f"{code:<{COLUMN}}# {comment}" if note else code) + "\n" for code, note, comment in lines
    )


def quoted(text: str) -> str:
    """A text as TOML."""
    return tomli_w.dumps({"x": text}).removeprefix("x = ").rstrip("\n")

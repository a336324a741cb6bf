"""The model card: README.md of an export (L3)."""

from pathlib import Path

from jinja2 import StrictUndefined, Template

from megagpt import __version__
from megagpt.checkpoint.export import Weights
from megagpt.hub.compare import Comparison
from megagpt.hub.shapes import CLASSES, model_type
from megagpt.log import read_metrics
from megagpt.log.markdown import cell

CARD = Path(__file__).with_name("card.md")
"""The card's template."""


def model_card(
    weights: Weights,
    source: Path,
    found: Comparison,
    dtype: str,
    compared: str,
    turns: bool = False,
) -> str:
    """The text of README.md. compared: what the windows were that were compared. turns: whether
    the tokenizer has tokens for the turns of a dialogue."""
    config, kind = weights.config, model_type(weights.config.model)
    records = read_metrics(source) if (source / "metrics.jsonl").exists() else []
    losses = [r for r in records if "validation_loss" in r]
    sources = ", ".join(f"{cell(str(s.path))} (weight {s.weight:g})" for s in config.data.train)
    template = Template(
        CARD.read_text(encoding="utf-8"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return template.render(
        kind=kind,
        name=cell(source.resolve().name),
        cls=CLASSES[kind].name,
        version=__version__,
        model=config.model,
        facts=weights.facts,
        tokenizer=cell(Path(weights.facts["tokenizer"]).name),
        sources=sources,
        evaluated=losses[-1] if losses else None,
        dtype=dtype,
        compared=cell(compared),
        found=found,
        turns=turns,
    )

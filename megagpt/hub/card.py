"""The model card: README.md of an export (L3)."""

from pathlib import Path

from megagpt import __version__
from megagpt.checkpoint.export import Weights
from megagpt.hub.compare import Comparison
from megagpt.hub.shapes import CLASSES, model_type
from megagpt.log import read_metrics
from megagpt.log.markdown import cell

CARD = Path(__file__).with_name("card.md")
"""What str.format makes a card of."""
_NOTES = {
    "all": (
        "`<|endoftext|>` in a text is the special token to transformers' tokenizer and plain text "
        "to megagpt's; pass `split_special_tokens=True` to have it as text.",
        "megagpt puts END-OF-DOCUMENT before each document; the tokenizer adds none by itself.",
    ),
    "turns": (
        "chat_template.jinja writes the turns of a dialogue as megagpt does, by "
        "`apply_chat_template`; but a message that contains `<|end|>` or another token for turns "
        "ends its turn there, which is plain text to megagpt.",
    ),
    "gpt_neo": (
        'Do not pass `attn_implementation="flash_attention_2"`: transformers then ignores the '
        "window of the local layers, and the logits are others.",
        "The biases of q, k and v, which GPT-Neo has not, are folded into its matrices and into "
        "ln_1.bias, exactly but for rounding. Weight decay or dropout in further training acts on "
        "them as they are here.",
        "vLLM and llama.cpp have no GPT-Neo.",
    ),
    "gpt2": (
        "llama.cpp's converter knows a tokenizer by a hash of some ids, and of these GPT-2's own; "
        "with another it stops until that is put on its list.",
    ),
    "imagegpt": (
        "The biases are 0 and megagpt has none; further training in transformers moves them.",
        "An image is its pixels in raster order behind the last id, which begins it. Colours, "
        "where they are known, are the clusters of preprocessor_config.json: c stands for the byte "
        "rint(127.5 (c + 1)).",
    ),
    "openai-gpt": ("The class has no cache: generating computes all tokens again for each one.",),
}


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
    loss = "not known"
    if losses:
        loss = f"{losses[-1]['validation_loss']:.4f} nats at {losses[-1]['tokens']:,} tokens"
    sources = ", ".join(f"{cell(str(s.path))} (weight {s.weight:g})" for s in config.data.train)
    notes = [*_NOTES.get(kind, ())]
    if weights.facts["tokenizer"] and kind != "imagegpt":
        notes += _NOTES["all"]
    if turns:
        notes += _NOTES["turns"]
    if config.model.dropout:
        notes.append(
            f"config.json has the dropout of training, {config.model.dropout:g}; transformers "
            "applies it in training mode only."
        )
    return CARD.read_text(encoding="utf-8").format(
        task="unconditional-image-generation" if kind == "imagegpt" else "text-generation",
        name=cell(source.resolve().name),
        cls=CLASSES[kind].name,
        version=__version__,
        model=config.model,
        facts=weights.facts,
        tokenizer=cell(Path(weights.facts["tokenizer"]).name) or "not known",
        data=sources if weights.facts["tokens"] else "not known (imported weights)",
        loss=loss,
        dtype=dtype,
        compared=cell(compared),
        found=found,
        cache="which this class computes without a cache" if kind == "openai-gpt" else "cached",
        notes="\n".join(f"- {note}" for note in notes) or "- nothing",
    )

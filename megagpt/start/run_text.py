"""The text of a run file: every line with what it means, at most twenty of them (L3)."""

from megagpt.config.flops import parameters
from megagpt.config.presets import PRESETS
from megagpt.config.sections import DataSource
from megagpt.corpus.manifest import CorpusManifest
from megagpt.start.fit import Fitted, round_down

COLUMN = 40
"""Where comments begin."""


def run_text(fitted: Fitted, corpus: CorpusManifest, name: str) -> str:
    """The run file, which load_run reads back as fitted.config."""
    config, schedule = fitted.config, fitted.config.schedule
    total = schedule.total_tokens
    every = max(schedule.batch_tokens, round_down(total / 10))
    preset = fitted.size in PRESETS
    lines: list[tuple[str, str]] = []
    if preset:
        lines.append((f'model = "{fitted.size}"', "shape and recipe: docs/reference/models.md"))
    lines += [
        (f"output = {quoted(config.output)}", f"written by: megagpt train {name}"),
        (f"evaluate.every_tokens = {every:_}", "the validation loss"),
        (f"checkpoint.every_tokens = {every:_}", "what a killed run goes on from"),
        ("", ""),
        ("[model]", f"{parameters(config.model):,} parameters"),
    ]
    lines += _model(fitted, corpus, preset)
    lines += [("", ""), ("[data]", "")]
    for key in ("train", "validation"):
        if sources := getattr(config.data, key):
            lines.append((f"{key} = [{', '.join(map(_source, sources))}]", ""))
    lines += [("", ""), ("[schedule]", "everything in tokens")]
    lines += _schedule(fitted, preset)
    lines += [("", ""), ("[parallel]", "how it is computed; the result stays the same")]
    lines += _parallel(fitted)
    return "".join(_line(*line) for line in lines)


def quoted(text: str) -> str:
    """A text as TOML."""
    import tomli_w

    return tomli_w.dumps({"x": text}).removeprefix("x = ").rstrip("\n")


def _source(source: DataSource) -> str:
    weight = f", weight = {source.weight}" if source.weight != 1.0 else ""
    return f"{{ path = {quoted(source.path)}{weight} }}"


def _line(code: str, comment: str) -> str:
    return (f"{code:<{COLUMN}}# {comment}" if comment else code).rstrip() + "\n"


def _model(fitted: Fitted, corpus: CorpusManifest, preset: bool) -> list[tuple[str, str]]:
    """[model]: the shape, or where a preset has it, what differs."""
    model = fitted.config.model
    vocabulary = (
        f"vocab_size = {model.vocab_size}",
        f"as the corpus has: {corpus.tokenizer_name or 'ids of no text'}",
    )
    context = (f"n_ctx = {model.n_ctx}", "tokens that it sees at once")
    usual = PRESETS[fitted.size].model.family if preset else "gpt2"
    if model.family != usual:
        vocabulary = (f'family = "{model.family}"\n{vocabulary[0]}', vocabulary[1])
    if preset:
        return [vocabulary, *([context] if model.n_ctx != PRESETS[fitted.size].model.n_ctx else [])]
    return [
        (f"n_layer = {model.n_layer}", "blocks"),
        (f"n_head = {model.n_head}", "attention heads of each"),
        (f"d_model = {model.d_model}", "width"),
        context,
        vocabulary,
    ]


def _schedule(fitted: Fitted, preset: bool) -> list[tuple[str, str]]:
    """[schedule]: every number that does not come from the preset."""
    config, schedule = fitted.config, fitted.config.schedule
    total = f"{fitted.epochs:.3g} epochs: {fitted.why_tokens}"
    sequences = schedule.batch_tokens // config.model.n_ctx
    lines = [
        (f"total_tokens = {schedule.total_tokens:_}", total),
        (f"warmup_tokens = {schedule.warmup_tokens:_}", "the learning rate rises over them"),
    ]
    if preset and PRESETS[fitted.size].schedule.get("decay_tokens"):
        lines.append((f"decay_tokens = {schedule.decay_tokens:_}", "and falls to its floor here"))
    if not preset:
        lines.append((f"peak_lr = {schedule.peak_lr:g}", ""))
    lines.append((f"batch_tokens = {schedule.batch_tokens:_}", f"a step: {sequences} sequences"))
    if preset and PRESETS[fitted.size].schedule.get("ramp_tokens"):
        ramp = "the batch grows over them" if schedule.ramp_tokens else "no ramp: the run is short"
        lines += [
            (f"ramp_start_tokens = {schedule.ramp_start_tokens}", "the first step"),
            (f"ramp_tokens = {schedule.ramp_tokens:_}", ramp),
        ]
    return lines


def _parallel(fitted: Fitted) -> list[tuple[str, str]]:
    """[parallel]: what is not its default."""
    parallel, lines = fitted.config.parallel, []
    if fitted.judged:
        gpus, gpu = fitted.judged.cluster.gpus, fitted.judged.cluster.gpu
        lines.append((f'ds_config = "{parallel.ds_config}"', f"for {gpus:,} {gpu}"))
    for key, what in (("pipeline", "stages"), ("tensor", "ranks that share a layer")):
        if (value := getattr(parallel, key)) > 1:
            lines.append((f"{key} = {value}", what))
    lines.append((f"micro_batch = {parallel.micro_batch}", "sequences at a time"))
    if parallel.recompute != "none":
        lines.append((f'recompute = "{parallel.recompute}"', "saves memory, costs time"))
    if parallel.dtype != "bf16":
        lines.append((f'dtype = "{parallel.dtype}"', "a CPU's fastest"))
    return lines

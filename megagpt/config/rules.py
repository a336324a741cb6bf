"""Rules between the values of a run file that no type expresses (L0)."""

from collections.abc import Iterator

from megagpt.config.presets import ModelConfig
from megagpt.config.schedule import Schedule
from megagpt.config.sections import DataConfig, RunConfig


def problems_of(config: RunConfig) -> Iterator[str]:
    """Everything that no layout could repair; the layout's own rules stand in megagpt.plan."""
    for section, key in (
        *(("model", k) for k in ("n_layer", "n_head", "d_model", "n_ctx", "vocab_size")),
        *(("model", k) for k in ("vocab_multiple", "band_width")),
        *(("parallel", k) for k in ("micro_batch", "pipeline", "tensor", "recompute_every")),
        ("checkpoint", "keep_last"),
        ("evaluate", "batches"),
        ("optimizer", "max_skipped_steps"),
        ("optimizer", "spike_window"),
        ("evaluate", "sample_tokens"),
        ("log", "every_steps"),
    ):
        value = getattr(getattr(config, section), key)
        if value < 1:
            yield f"{section}.{key} = {value}: must be 1 or more"
    for section, key in (
        ("checkpoint", "stop_after_minutes"),
        ("checkpoint", "stop_after_steps"),
        ("log", "watchdog_minutes"),
        ("log", "check_replicas_every_steps"),
        ("log", "details_every_steps"),
        ("evaluate", "samples"),
    ):
        value = getattr(getattr(config, section), key)
        if not 0 <= value < float("inf"):
            yield f"{section}.{key} = {value}: must be 0 (off) or more"
    if not config.optimizer.spike_threshold > 0:
        yield f"optimizer.spike_threshold = {config.optimizer.spike_threshold}: must be above 0"
    for section, key, allowed in (
        ("parallel", "dtype", ("bf16", "fp16", "fp32")),
        ("parallel", "recompute", ("none", "full")),
        ("checkpoint", "on_failure", ("stop", "continue")),
        ("optimizer", "spike_action", ("none", "skip", "rollback")),
    ):
        value = getattr(getattr(config, section), key)
        if value not in allowed:
            yield f"{section}.{key} = {value!r}: must be one of {', '.join(allowed)}"
    steps = config.log.profile_steps
    if steps and not (len(steps) == 2 and 1 <= steps[0] <= steps[1]):
        yield (
            f"log.profile_steps = {list(steps)}: must be two steps, the first at least 1 and the "
            "last not before it"
        )
    yield from _model_problems(config.model)
    yield from config.schedule.problems()
    yield from _batch_problems(config.schedule, config.model.n_ctx)
    yield from _data_problems(config.data, config.model.n_ctx)


def _model_problems(model: ModelConfig) -> Iterator[str]:
    if model.n_head > 0 and model.d_model % model.n_head:
        yield (
            f"model.d_model = {model.d_model}: must be a multiple of n_head ({model.n_head}), so "
            "that every head has the same width"
        )
    if model.family not in ("gpt2", "gpt1", "igpt"):
        yield f"model.family = {model.family!r}: must be gpt2 (GPT-2 and GPT-3), gpt1 or igpt"
    if not model.attention or set(model.attention) - {"dense", "banded"}:
        yield f'model.attention = {list(model.attention)}: must list "dense" and "banded"'
    if not 0.0 <= model.dropout < 1.0:
        yield f"model.dropout = {model.dropout}: must be at least 0 and less than 1"


def _batch_problems(schedule: Schedule, n_ctx: int) -> Iterator[str]:
    for key, tokens in (
        ("batch_tokens", schedule.batch_tokens),
        ("ramp_start_tokens", schedule.start_tokens),
        ("ramp_increment_tokens", schedule.increment_tokens),
    ):
        if n_ctx > 0 and tokens > 0 and tokens % n_ctx:
            yield (
                f"schedule.{key} = {tokens}: must be a multiple of model.n_ctx ({n_ctx}), the "
                "tokens of one sequence"
            )


def _data_problems(data: DataConfig, n_ctx: int) -> Iterator[str]:
    if not data.train:
        yield "data.train = []: must name at least one folder of shards"
    for kind in ("train", "validation"):
        for place, source in enumerate(getattr(data, kind)):
            # A corpus may rest at first and join with a change.
            joins = kind == "train" and any(any(c.weights[place : place + 1]) for c in data.changes)
            if not (source.weight > 0 or (joins and source.weight == 0)):
                yield f"data.{kind}: weight = {source.weight} of {source.path}: must be above 0"
    if data.train and not any(source.weight for source in data.train):
        yield "data.train: every weight is 0; one must be above 0 where the run begins"
    yield from _change_problems(data, n_ctx)


def _change_problems(data: DataConfig, n_ctx: int) -> Iterator[str]:
    before = 0
    for place, change in enumerate(data.changes):
        at, weights = change.at_tokens, change.weights
        where = f"data.changes[{place}]"
        if at <= before:
            yield f"{where}.at_tokens = {at}: must be above {before}, where the last weights begin"
        if n_ctx > 0 and at % n_ctx:
            yield (
                f"{where}.at_tokens = {at}: must be a multiple of model.n_ctx ({n_ctx}), the "
                "tokens of one sequence"
            )
        if len(weights) != len(data.train):
            yield (
                f"{where}.weights = {list(weights)}: must be {len(data.train)} numbers, one for "
                "each corpus of data.train in its order"
            )
        if not all(0 <= weight < float("inf") for weight in weights) or not any(weights):
            yield f"{where}.weights = {list(weights)}: must be 0 or more, and one of them above 0"
        before = at

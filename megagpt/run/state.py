"""Where a run is, as a value, and the step that comes next (L2).

With the run file, a RunState is all that decides what comes next: which samples, how many, at what
rate, and which updates are skipped.
"""

import dataclasses
from dataclasses import dataclass

from megagpt.checkpoint.journal import Journal
from megagpt.config import RunConfig
from megagpt.engine import StepResult


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """What one step reads and at which rate."""

    number: int
    """Counted from 1."""
    tokens: int
    """Tokens consumed when it is done."""
    batch_tokens: int
    first_sample: int
    n_samples: int
    lr: float


@dataclass(frozen=True, kw_only=True, slots=True)
class RunState:
    """Where a run is."""

    step: int = 0
    """Steps done."""
    tokens: int = 0
    """Tokens trained on."""
    skipped_steps: int = 0
    """Steps whose update was not made."""
    samples: int = 0
    """Samples consumed: those trained on and those that a rollback skipped."""
    latest: Step | None = None
    """The step that was done last; None at the start."""
    journal: Journal = Journal()

    def replaced(self, **fields: object) -> "RunState":
        """The state with these fields instead."""
        return dataclasses.replace(self, **fields)  # type: ignore[arg-type]

    def first_sample(self, config: RunConfig, step: int, tokens: int) -> int:
        """The first sample of the step that follows `step` steps and `tokens` tokens."""
        return tokens // config.model.n_ctx + self.journal.skipped_samples(step)

    def step_at(self, config: RunConfig, step: int, tokens: int) -> Step:
        """The step that follows `step` steps and `tokens` tokens of this run."""
        batch_tokens = config.schedule.batch(tokens)
        end = tokens + batch_tokens
        return Step(
            number=step + 1,
            tokens=end,
            batch_tokens=batch_tokens,
            first_sample=self.first_sample(config, step, tokens),
            n_samples=batch_tokens // config.model.n_ctx,
            lr=config.schedule.lr(end),
        )

    def end(self, config: RunConfig) -> tuple[int, int]:
        """(steps, tokens) of the whole run, which another schedule may have led to where it is."""
        rest = [*config.schedule.segments_from(self.step, self.tokens)]
        return (rest[-1].last_step, rest[-1].last_tokens) if rest else (self.step, self.tokens)

    def next_step(self, config: RunConfig) -> Step:
        """The step that comes next."""
        return self.step_at(config, self.step, self.tokens)

    def after(self, step: Step, result: StepResult) -> "RunState":
        """Where the run is once `step` is done. An update that was skipped because of a spike
        stands in the journal from then on, once."""
        journal = self.journal
        if result.skipped and not journal.skips_update(step.number):
            journal = journal.skip_update(step.number)
        return self.replaced(
            step=step.number,
            tokens=step.tokens,
            skipped_steps=self.skipped_steps + (not result.applied),
            samples=step.first_sample + step.n_samples,
            latest=step,
            journal=journal,
        )


def crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` lies in (before, after]; never for 0."""
    return every > 0 and before // every != after // every

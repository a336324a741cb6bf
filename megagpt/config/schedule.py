"""Learning rate and batch size as functions of tokens consumed (L0).

GPT-3 (Brown et al. 2020, Appendix B): linear warm-up of the learning rate over the first 375M
tokens, cosine down to 10% of the peak at 260B tokens, constant after that; the batch grows
linearly from 32k tokens to its full size over the first 4-12 billion tokens.

A run is a walk over tokens: at `tokens` consumed the next step takes `batch(tokens)` tokens and
ends at `tokens + batch(tokens)`; the learning rate of its update is `lr` at its end, so that the
first update is not lost at zero. Nothing here knows the number of ranks: the batch moves in
whole multiples of `ramp_increment_tokens`, so every layout whose ranks can share one increment
walks the same steps.

A floor of 0 is reached one batch behind the end: GPT-1 and Image GPT anneal to 0, and at its very
end the last update would be made at a rate of 0. OpenAI's code for GPT-1 takes the cosine at t / T
with t = 0 for the first update, so that its last has a rate above 0, and the first has none.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Gt, Interval

from megagpt.config.bounds import OneOrMore, ZeroOrMore, around, divisors_near


@dataclass(frozen=True, slots=True)
class Segment:
    """Steps in a row that have the same batch size."""

    first_step: int
    """Steps done before this segment."""
    n_steps: int
    first_tokens: int
    """Tokens consumed before this segment."""
    batch_tokens: int

    @property
    def last_step(self) -> int:
        """Steps done after this segment."""
        return self.first_step + self.n_steps

    @property
    def last_tokens(self) -> int:
        """Tokens consumed after this segment."""
        return self.first_tokens + self.n_steps * self.batch_tokens


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The [schedule] section: what is learnt at which point, everything in tokens."""

    total_tokens: OneOrMore
    """Tokens to train on; the last step may end up to one batch past them."""
    warmup_tokens: ZeroOrMore = 0
    """Tokens over which the learning rate rises linearly from 0 to peak_lr."""
    decay_tokens: ZeroOrMore = 0
    """Tokens consumed where the decay reaches its floor; 0: total_tokens."""
    decay: Literal["cosine", "linear"] = "cosine"
    """Form of the decay from peak_lr to the floor; linear is GPT-1's in fine-tuning."""
    peak_lr: Annotated[float, Gt(0)]
    """Learning rate at the end of the warm-up."""
    min_lr_ratio: Annotated[float, Interval(ge=0, le=1)] = 0.1
    """Floor of the learning rate, as a share of peak_lr."""
    batch_tokens: OneOrMore
    """Tokens of a full step, over all ranks."""
    ramp_start_tokens: ZeroOrMore = 0
    """Tokens of the first step; 0: batch_tokens (no ramp)."""
    ramp_tokens: ZeroOrMore = 0
    """Tokens over which the batch grows from ramp_start_tokens to batch_tokens."""
    ramp_increment_tokens: ZeroOrMore = 0
    """The batch grows in multiples of this; 0: ramp_start_tokens."""

    @property
    def start_tokens(self) -> int:
        """Tokens of the first step."""
        return self.ramp_start_tokens or self.batch_tokens

    @property
    def increment_tokens(self) -> int:
        """Tokens by which the batch grows; every batch is a multiple of this."""
        return self.ramp_increment_tokens or self.start_tokens

    def lr(self, tokens: int) -> float:
        """Learning rate of the update that ends at `tokens` consumed."""
        # 1) linear warm-up
        if tokens < self.warmup_tokens:
            return self.peak_lr * tokens / self.warmup_tokens
        # 2) constant floor after the decay
        floor = self.peak_lr * self.min_lr_ratio
        end = self.decay_tokens or self.total_tokens
        if not floor:
            end += self.batch_tokens
        if tokens >= end:
            return floor
        # 3) in between
        left = 1.0 - (tokens - self.warmup_tokens) / (end - self.warmup_tokens)
        if self.decay == "cosine":
            left = 0.5 * (1.0 - math.cos(math.pi * left))
        return floor + (self.peak_lr - floor) * left

    def batch(self, tokens: int) -> int:
        """Tokens of the step that starts at `tokens` consumed."""
        if tokens >= self.ramp_tokens:
            return self.batch_tokens
        growth = (self.batch_tokens - self.start_tokens) * tokens // self.ramp_tokens
        return self.start_tokens + growth // self.increment_tokens * self.increment_tokens

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """The whole run as runs of equal steps, in order; computed without walking each step."""
        return tuple(self.segments_from(0, 0))

    def segments_from(self, step: int, tokens: int) -> Iterator[Segment]:
        """What is left of a run that has done so many steps and consumed so many tokens, which
        another schedule may have led there."""
        while tokens < self.total_tokens:
            size = self.batch(tokens)
            n_steps = -(-(self._batch_until(tokens) - tokens) // size)
            yield Segment(step, n_steps, tokens, size)
            step, tokens = step + n_steps, tokens + n_steps * size

    def _batch_until(self, tokens: int) -> int:
        """First point (tokens consumed) after `tokens` where batch() differs, or the run's end."""
        if tokens >= self.ramp_tokens:
            return self.total_tokens
        grown = self.batch(tokens) + self.increment_tokens - self.start_tokens
        growth = self.batch_tokens - self.start_tokens
        # Smallest t with growth * t // ramp_tokens >= grown, and never beyond the ramp's own end.
        turn = -(-grown * self.ramp_tokens // growth) if 0 < grown <= growth else self.ramp_tokens
        return min(turn, self.ramp_tokens, self.total_tokens)

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.segments[-1].last_step

    @property
    def end_tokens(self) -> int:
        """Tokens consumed when the run is done."""
        return self.segments[-1].last_tokens

    def position(self, step: int) -> tuple[int, int]:
        """(tokens consumed before, tokens of) the step after `step` steps are done.

        Raises ValueError for a step outside the run.
        """
        for segment in self.segments:
            if segment.first_step <= step < segment.last_step:
                before = segment.first_tokens + (step - segment.first_step) * segment.batch_tokens
                return before, segment.batch_tokens
        raise ValueError(f"step {step} is outside the run: it has steps 0 to {self.n_steps - 1}")

    def problems(self, n_ctx: int = 1) -> Iterator[str]:
        """What makes this schedule impossible for sequences of n_ctx tokens, with the remedies."""
        end = self.decay_tokens or self.total_tokens
        if self.warmup_tokens >= end:
            yield (
                f"schedule.warmup_tokens = {self.warmup_tokens}: must be less than decay_tokens "
                f"({end}), where the decay ends"
            )
        # Only keys that the run file has are spoken of.
        key = "ramp_increment_tokens" if self.ramp_increment_tokens else "ramp_start_tokens"
        increment, sound = self.increment_tokens, self.increment_tokens % n_ctx == 0
        if self.batch_tokens % n_ctx:
            unit, grows = n_ctx, ""
            if sound and self.ramp_start_tokens:
                unit, grows = increment, f" and of {key} ({increment}), in which the batch grows"
            yield (
                f"schedule.batch_tokens = {self.batch_tokens}: must be a multiple of model.n_ctx "
                f"({n_ctx}), the tokens of one sequence{grows}; use "
                f"{around(self.batch_tokens, unit)}"
            )
            if not sound and increment != self.batch_tokens:
                yield (
                    f"schedule.{key} = {increment}: must be a multiple of model.n_ctx ({n_ctx}), "
                    f"the tokens of one sequence; use {around(increment, n_ctx)}"
                )
        elif not sound or self.batch_tokens % increment:
            yield self._no_divisor(key, n_ctx)
        elif increment != self.start_tokens:
            yield from self._start_problems()

    def _no_divisor(self, key: str, n_ctx: int) -> str:
        """The refusal of an increment by which the batch cannot grow, with those next to it."""
        increment, sequences = self.increment_tokens, self.batch_tokens // n_ctx
        near = [n_ctx * n for n in divisors_near(sequences, increment // n_ctx)]
        text = (
            f"schedule.{key} = {increment}: must be a multiple of model.n_ctx ({n_ctx}) that "
            f"divides batch_tokens ({self.batch_tokens}), because the batch grows in steps of it; "
            f"use {' or '.join(map(str, near))}"
        )
        if increment % n_ctx == 0 and increment < self.batch_tokens:
            text += f"; or batch_tokens = {around(self.batch_tokens, increment)}"
        return text

    def _start_problems(self) -> Iterator[str]:
        """Of a first batch beside an increment of its own."""
        start, increment = self.start_tokens, self.increment_tokens
        if start > self.batch_tokens:
            yield (
                f"schedule.ramp_start_tokens = {start}: must not be more than batch_tokens "
                f"({self.batch_tokens}), the last batch; use {self.batch_tokens} or less"
            )
        elif start % increment:
            yield (
                f"schedule.ramp_start_tokens = {start}: must be a multiple of "
                f"ramp_increment_tokens ({increment}), in which the batch grows; use "
                f"{around(start, increment)}"
            )

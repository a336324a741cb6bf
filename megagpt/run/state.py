"""Where a run is (L0, stdlib only)."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Where a run is; with the run file this is all that decides what comes next."""

    step: int = 0
    tokens: int = 0
    skipped_steps: int = 0

    def after(self, batch_tokens: int, applied: bool) -> "Progress":
        """The progress once a step of `batch_tokens` is done."""
        skipped = self.skipped_steps + (not applied)
        return Progress(
            step=self.step + 1, tokens=self.tokens + batch_tokens, skipped_steps=skipped
        )


def crossed(every: int, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, after]; never for 0."""
    return every > 0 and before // every != after // every

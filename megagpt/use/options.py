"""How a text is made: what a caller may ask for, and options that set a dataclass (L3, without
torch)."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from megagpt.errors import UsageError

if TYPE_CHECKING:
    import argparse

MOST_LOGPROBS = 20
"""Likeliest tokens that are told of each position at most."""
PENALTY = 2.0
"""Largest frequency or presence penalty, either way."""
REPETITION = 1000.0
"""Largest repetition penalty, and one over the smallest: beyond them logits would overflow."""
BIAS = 100.0
"""Largest bias of a token's logit, either way: it forbids or forces it."""
SHOWN = 80
"""Characters of a wrong value that an error repeats."""


# --- options of a command that are fields of a dataclass ----------------------------------------


def option(default: int | float, metavar: str, text: str, name: str = "") -> Any:
    """A field that an option of a command sets: `name`, or the field's own name."""
    return field(default=default, metadata={"metavar": metavar, "help": text, "name": name})


def option_of(one: Field[Any]) -> str:
    """The option that sets a field."""
    return one.metadata["name"] or f"--{one.name.replace('_', '-')}"


def add_fields(parser: "argparse.ArgumentParser", kind: type) -> None:
    """Adds the options of a dataclass; `given` reads them."""
    for one in _set_by_options(kind):
        parser.add_argument(
            option_of(one),
            dest=one.name,
            metavar=one.metadata["metavar"],
            type=type(one.default),
            default=one.default,
            help=f"{one.metadata['help']} (default: {one.default:,})",
        )


def given(args: "argparse.Namespace", kind: type) -> dict[str, Any]:
    """What the options of a dataclass say, as its arguments."""
    return {one.name: getattr(args, one.name) for one in _set_by_options(kind)}


def _set_by_options(kind: Any) -> list[Field[Any]]:
    return [one for one in fields(kind) if one.metadata]


# --- texts --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How a text is made. Logits are changed by the penalties first, then by the biases; then a
    token is drawn by temperature, then top-k, then top-p."""

    max_tokens: int = option(200, "N", "tokens at most")
    """Without the prompt."""
    min_tokens: int = 0
    """END-OF-DOCUMENT and stop_tokens are not drawn before so many tokens."""
    temperature: float = option(
        0.8, "T", "below 1 the likely tokens get likelier; 0: always the likeliest"
    )
    """Divides the logits."""
    top_k: int = option(0, "K", "draw among the K likeliest tokens; 0: among all")
    top_p: float = option(
        1.0, "P", "draw among the fewest likeliest tokens of probability P, 0 < P <= 1, together"
    )
    frequency_penalty: float = option(
        0.0, "A", "taken from a token's logit for each time it is in the text"
    )
    """So far, without the prompt."""
    presence_penalty: float = option(
        0.0, "A", "taken once from the logit of a token that is in the text"
    )
    """So far, without the prompt."""
    repetition_penalty: float = option(
        1.0, "A", "divides the logits above 0 of tokens in prompt and text, multiplies those below"
    )
    """Keskar et al. 2019, section 4.1."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token -> what is added to its logit, -100 to 100; -100 forbids it."""
    seed: int = 0
    """The same seed gives the same text."""
    stop: bool = True
    """End at END-OF-DOCUMENT; False: go on with the next document."""
    stop_texts: tuple[str, ...] = ()
    """The text ends before the one of these that is whole first."""
    stop_tokens: tuple[int, ...] = ()
    """The text ends before the first of these tokens."""
    start: bool = True
    """The prompt is the beginning of a document: END-OF-DOCUMENT, which stands between documents
    in training, is put before it. False: it continues one."""
    slide: bool = True
    """Beyond n_ctx positions the last half of the context is read anew and the text goes on;
    False: it ends there."""
    logprobs: int = -1
    """Tell the log probability of each token and of so many likeliest; -1: of none. The model's
    own, before penalties and temperature."""
    score_prompt: bool = False
    """Tell them of the prompt's tokens, too."""

    def check(self) -> None:
        """Raises UsageError that names every value that makes no sense, with its rule."""
        problems = [
            f"{name} = {_shown(getattr(self, name))}: must be {rule}"
            for name, sound, rule in self._rules()
            if not sound
        ]
        if problems:
            raise UsageError("\n".join(problems))

    def _rules(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether its value keeps the rule, the rule)."""
        yield "max_tokens", self.max_tokens >= 0, "0 or more"
        yield "min_tokens", 0 <= self.min_tokens, "0 or more"
        yield "stop_texts", all(self.stop_texts), "without an empty text, which is everywhere"
        known = range(-1, MOST_LOGPROBS + 1)
        yield "logprobs", self.logprobs in known, f"0 to {MOST_LOGPROBS}, or -1 for none"
        yield "temperature", 0 <= self.temperature < math.inf, "0 or more"
        yield "top_k", self.top_k >= 0, "0 (all tokens) or more"
        yield "top_p", 0 < self.top_p <= 1, "greater than 0 and at most 1"
        for name in ("frequency_penalty", "presence_penalty"):
            yield name, abs(getattr(self, name)) <= PENALTY, f"{-PENALTY} to {PENALTY}"
        sound = 1 / REPETITION <= self.repetition_penalty <= REPETITION
        yield "repetition_penalty", sound, f"{1 / REPETITION} to {REPETITION:.0f}"
        sound = all(abs(bias) <= BIAS for bias in self.logit_bias.values())
        yield "logit_bias", sound, f"of numbers from {-BIAS:.0f} to {BIAS:.0f}"

    @property
    def scored(self) -> int:
        """How many likeliest tokens are told of each of the prompt's; -1: nothing is told."""
        return self.logprobs if self.score_prompt else -1

    @property
    def changes_logits(self) -> bool:
        """Whether anything is done to the logits before a token is drawn."""
        penalties = (self.frequency_penalty, self.presence_penalty, self.repetition_penalty)
        return penalties != (0.0, 0.0, 1.0) or bool(self.logit_bias) or self.min_tokens > 0


def _shown(value: object) -> str:
    """A wrong value as people write it: a list as JSON does."""
    text = json.dumps(value) if isinstance(value, tuple) else str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."

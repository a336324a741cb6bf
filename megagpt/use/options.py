"""How a text is made: what a caller may ask for (L3, without torch)."""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from megagpt.errors import UsageError

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


@dataclass(frozen=True, kw_only=True, slots=True)
class TextOptions:
    """How a text is made. Logits are changed by the penalties first, then by the biases; then a
    token is drawn by temperature, then top-k, then top-p."""

    max_tokens: int = 200
    """Length of the text at most, without the prompt."""
    min_tokens: int = 0
    """END-OF-DOCUMENT and stop_tokens are not drawn before so many tokens."""
    temperature: float = 0.8
    """Divides the logits; below 1 the likely get likelier, 0 takes the likeliest always."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the fewest likeliest tokens that reach this probability together; 1: among all."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that it is in the text so far, without the
    prompt."""
    presence_penalty: float = 0.0
    """Taken once from the logit of a token that is in the text so far, without the prompt."""
    repetition_penalty: float = 1.0
    """Of tokens in prompt and text, divides logits above 0 and multiplies those below (Keskar et
    al. 2019, section 4.1)."""
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

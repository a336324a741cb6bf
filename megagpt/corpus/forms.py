"""GPT-1's input forms: texts and their class as one record (section 3.3).

    forms = Forms(tokens=encoding.n_vocab, length=64)
    prepare("data/train", records=[forms.classification(ids, 2)], vocabulary=forms.vocabulary)

    classification   start text extract                                      one part
    entailment       start premise delimiter hypothesis extract              one part
    similarity       start a delimiter b extract, and b before a             two parts
    choice           start context delimiter answer extract, each answer     as many as answers

A record is its parts, each filled up to one length, and then the class. Every token of a part but
the start is scored as the next token, and so is the class, which the classifier takes for its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megagpt.corpus.records import Masked
from megagpt.errors import UsageError

Text = Sequence[int]
"""Ids of a tokenizer, without END-OF-DOCUMENT."""


@dataclass(frozen=True)
class Forms:
    """Writes samples. Texts that do not fit are cut at their end; two share the room evenly.

    Raises UsageError for a length without room for a token of each text, and ids of no tokenizer.
    """

    tokens: int
    """Ids of the tokenizer; the three of the forms stand behind them."""
    length: int
    """Tokens of a part: model.n_ctx / model.parts."""

    @property
    def start(self) -> int:
        """The id with which each part begins."""
        return self.tokens

    @property
    def delimiter(self) -> int:
        """The id between two texts."""
        return self.tokens + 1

    @property
    def extract(self) -> int:
        """The id whose state the classifier reads; the last of the vocabulary."""
        return self.tokens + 2

    @property
    def vocabulary(self) -> int:
        """What model.vocab_size must be."""
        return self.tokens + 3

    def classification(self, text: Text, label: int) -> Masked:
        """A text of the class `label`."""
        return self._record([[text]], label)

    def entailment(self, premise: Text, hypothesis: Text, label: int) -> Masked:
        """Two texts whose order means something."""
        return self._record([[premise, hypothesis]], label)

    def similarity(self, one: Text, other: Text, label: int) -> Masked:
        """Two texts in either order."""
        return self._record([[one, other], [other, one]], label)

    def choice(self, context: Text, answers: Sequence[Text], right: int) -> Masked:
        """A context and what may follow it, of which number `right` does."""
        return self._record([[context, answer] for answer in answers], right)

    def _record(self, parts: Sequence[Sequence[Text]], label: int) -> Masked:
        rows = [self._part(texts) for texts in parts]
        ids = np.zeros((len(rows), self.length), np.int64)
        scored = np.zeros(ids.shape, bool)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = row
            scored[number, 1 : len(row)] = True
        return Masked(np.append(ids, label), np.append(scored, True))

    def _part(self, texts: Sequence[Text]) -> list[int]:
        room = (self.length - 1 - len(texts)) // len(texts)
        if room < 1:
            raise UsageError(
                f"length {self.length}: has no room for {len(texts)} texts between their tokens; "
                f"must be {1 + 2 * len(texts)} or more"
            )
        row = [self.start]
        for text in texts:
            if wrong := [id_ for id_ in text if not 0 <= id_ < self.tokens]:
                raise UsageError(
                    f"a text holds the id {wrong[0]}; a tokenizer of {self.tokens} tokens has 0 to "
                    f"{self.tokens - 1}, and those behind are of the forms"
                )
            row += [*text[:room], self.delimiter]
        return [*row[:-1], self.extract]

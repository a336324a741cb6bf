"""What a preparation did, for people."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from megagpt.corpus.documents import Inputs
from megagpt.errors import DamageError

SHOWN = 20
"""Problems of a kind that are described; the rest is counted."""

log = logging.getLogger("megagpt.data")


@dataclass
class Summary:
    """Figures of one preparation."""

    folders: tuple[Path, ...] = ()
    """Train, and validation when there is one."""
    strict: bool = False
    """Whether the first document that has to be left out ends the preparation."""
    validation_fraction: float = 0.0
    """What was asked for."""
    documents: list[int] = field(default_factory=lambda: [0, 0])
    """Of train and validation."""
    tokens: list[int] = field(default_factory=lambda: [0, 0])
    text_bytes: list[int] = field(default_factory=lambda: [0, 0])
    longest_tokens: int = 0
    longest_place: str = ""
    left_out: Counter[str] = field(default_factory=Counter)
    """Documents by reason."""
    notes: Counter[str] = field(default_factory=Counter)
    messages: list[str] = field(default_factory=list)
    backend: str = ""
    elapsed_s: float = 0.0
    finished_before: bool = False
    """Nothing was done, the output was complete."""
    _described: Counter[str] = field(default_factory=Counter)

    def describe(self, reason: str, where: str, detail: str) -> None:
        """Say once what is left out. Raises DamageError when strict."""
        text = f"{where}: {reason}" + (f" ({detail})" if detail else "")
        if self.strict:
            raise DamageError(f"{text}; repair the input, or run without --strict to leave it out")
        self._described[reason] += 1
        if self._described[reason] <= SHOWN:
            log.warning("%s; left out", text)
        elif self._described[reason] == SHOWN + 1:
            log.warning("further cases of %r are only counted", reason)

    def describe_inputs(self, inputs: Inputs) -> None:
        """Say and count what was passed over in looking for inputs."""
        for path, reason, detail in inputs.problems:
            self.describe(reason, path, detail)
            self.left_out[reason] += 1
        if inputs.others:
            self.notes["files of folders with an unknown ending"] = len(inputs.others)

    def text(self) -> str:
        """The summary as lines."""
        if self.finished_before:
            return (
                f"{self.folders[0]} is finished already: {sum(self.documents):,} documents, "
                f"{sum(self.tokens):,} tokens; nothing to do"
            )
        tokens, size = sum(self.tokens), sum(self.text_bytes)
        lines = []
        for place, folder in enumerate(self.folders):
            lines.append(
                f"{folder}: {self.documents[place]:,} documents, {self.tokens[place]:,} tokens"
            )
        if len(self.folders) > 1:
            lines += self._validation(self.documents[1] / max(sum(self.documents), 1))
        rate = tokens / self.elapsed_s if self.elapsed_s else 0.0
        lines += [
            f"text: {size / 1e6:,.1f} MB, {size / max(tokens, 1):.2f} bytes per token",
            f"longest document: {self.longest_tokens:,} tokens ({self.longest_place})",
            f"left out: {sum(self.left_out.values()):,} documents",
        ]
        lines += [f"  {reason}: {count:,}" for reason, count in sorted(self.left_out.items())]
        lines += [f"note: {note}: {count:,}" for note, count in sorted(self.notes.items())]
        lines += [f"note: {message}" for message in self.messages]
        lines.append(f"time: {self.elapsed_s:,.1f} s, {rate:,.0f} tokens/s with {self.backend}")
        return "\n".join(lines)

    def _validation(self, share: float) -> list[str]:
        """What was asked for and what came out."""
        of_tokens = self.tokens[1] / max(sum(self.tokens), 1)
        lines = [
            f"validation: {share:.2%} of the documents, {of_tokens:.2%} of the tokens; "
            f"{self.validation_fraction:.2%} was asked for"
        ]
        if not all(self.documents):
            lines.append(
                f"note: {self.folders[bool(self.documents[0])]} is empty: documents are drawn "
                "whole, and there are few; remove both folders and run again with "
                "--validation-by-place, which takes the end of each text"
            )
        return lines

"""slices.json: which file of a checkpoint holds which elements of which parameter (L2).

    {"parameters": {"h.0.ln_1.weight": {"shape": [768], "kind": "whole", "parts": 1, "cuts": [4]}},
     "cuts": [..., "0:0+384 1:384+384"]}

A cut is one for each tensor-parallel part: elements 0 to 383 lie in the file of rank 0. Parameters
that are cut alike share it. A rank that resumes reads this and opens the files that it needs; in
the headers of all files it would have to look otherwise. Checkpoints of earlier versions have none.
"""

import json
import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megagpt.engine import split as splits
from megagpt.engine.slices import Slice

Layout = tuple[tuple[int, ...], str, int]
"""Shape of one tensor-parallel part, the kind of split, the number of parts."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Elements [start, end) of one tensor-parallel part of a parameter, in a rank's file."""

    rank: int
    part: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Held:
    """What a checkpoint holds of one parameter."""

    layout: Layout
    stretches: list[Stretch] = field(default_factory=list)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return splits.whole_shape(*self.layout)

    def of_part(self, part: int) -> list[Stretch]:
        """The stretches of one part, in order of their starts."""
        return sorted((s for s in self.stretches if s.part == part), key=lambda s: s.start)

    def problem(self) -> str:
        """Why the stretches do not hold each element exactly once; "" when they do."""
        shape, _, parts = self.layout
        numel = math.prod(shape)
        for part in range(parts):
            done = 0
            borders = [(stretch.start, stretch.end) for stretch in self.of_part(part)]
            for start, end in [*borders, (numel, numel)]:
                if start != done:
                    files = "no file" if start > done else "two files"
                    return f"element {min(start, done)} of part {part} is in {files}"
                done = end
        return ""


Parameters = dict[str, Held]
"""By canonical name."""


def taken_in(parameters: Parameters, rank: int, slices: dict[str, Any]) -> None:
    """Adds what the file of a rank says that it holds: name -> facts. Raises KeyError, TypeError or
    ValueError for what is no such thing, or contradicts what is known already."""
    for name, facts in slices.items():
        layout, stretch = told(rank, facts)
        known = parameters.setdefault(name, Held(layout))
        if known.layout != layout:
            raise ValueError(f"{name} has another shape or split than in another rank's file")
        known.stretches.append(stretch)


def told(rank: int, facts: dict[str, Any]) -> tuple[Layout, Stretch]:
    """What the file of a rank says of one parameter."""
    end = facts["start"] + facts["numel"]
    layout = (tuple(facts["shape"]), facts["kind"], facts["parts"])
    return layout, Stretch(rank, facts["part"], facts["start"], end)


def facts_of(slices: Iterable[Slice]) -> dict[str, dict[str, Any]]:
    """What a rank's file says of the slices in it."""
    return {
        piece.name: {
            "shape": piece.shape,
            "start": piece.start,
            "numel": piece.numel,
            "kind": piece.split.kind,
            "part": piece.split.part,
            "parts": piece.split.parts,
        }
        for piece in slices
    }


def packed(slices: Iterable[Slice]) -> bytes:
    """facts_of them, for the way to the rank that writes the index."""
    return zlib.compress(json.dumps(facts_of(slices)).encode(), 1)


def index_of_packed(ranks: Sequence[bytes]) -> str:
    """The index of the files of all ranks, from what each has packed."""
    parameters: Parameters = {}
    for rank, content in enumerate(ranks):
        taken_in(parameters, rank, json.loads(zlib.decompress(content)))
    return index_text(parameters)


def index_text(parameters: Parameters) -> str:
    """The content of slices.json."""
    cuts: dict[str, int] = {}
    tree = {}
    for name in sorted(parameters):
        held = parameters[name]
        shape, kind, parts = held.layout
        texts = [
            " ".join(f"{s.rank}:{s.start}+{s.end - s.start}" for s in held.of_part(part))
            for part in range(parts)
        ]
        numbers = [cuts.setdefault(text, len(cuts)) for text in texts]
        tree[name] = {"shape": shape, "kind": kind, "parts": parts, "cuts": numbers}
    return json.dumps({"parameters": tree, "cuts": list(cuts)}) + "\n"


def parse_index(text: str) -> Parameters:
    """What the content of slices.json tells. Raises KeyError, TypeError, ValueError, IndexError or
    AttributeError for what is none."""
    tree = json.loads(text)
    cuts = [[_stretch(word) for word in cut.split()] for cut in tree["cuts"]]
    found = {}
    for name, facts in tree["parameters"].items():
        held = Held((tuple(facts["shape"]), facts["kind"], facts["parts"]))
        for part, number in enumerate(facts["cuts"]):
            held.stretches.extend(Stretch(rank, part, *place) for rank, *place in cuts[number])
        found[name] = held
    return found


def _stretch(word: str) -> tuple[int, int, int]:
    rank, _, place = word.partition(":")
    start, _, numel = place.partition("+")
    return int(rank), int(start), int(start) + int(numel)

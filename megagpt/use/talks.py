"""Dialogues as a corpus of which the answers alone are scored: `prepare_talks` (L3, without torch).

    prepare_talks([Path("talks.jsonl")], load_tokenizer("gpt2"), Path("data/talks"))

A line of JSON is a dialogue, as OpenAI's fine-tuning or ShareGPT writes it:

    {"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello!"}]}
    {"conversations": [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello!"}]}

Each becomes a document, its turns between tokens of their own. What an assistant says is scored,
with the token that ends it, and END-OF-DOCUMENT behind a last answer; an answer with "weight": 0 is
read alone, as with OpenAI.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megagpt.corpus.duplicates import text_hash
from megagpt.corpus.manifest import CorpusManifest
from megagpt.corpus.open import BOM
from megagpt.corpus.records import Masked, prepare
from megagpt.corpus.unfinished import beside
from megagpt.errors import DamageError, UsageError
from megagpt.files import write_file
from megagpt.tokenizer.portable import described
from megagpt.use.dialogue import ROLES, SpecialTokens, Turn, with_turns

if TYPE_CHECKING:
    import tiktoken

FORMS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""The field of a dialogue: those of a turn's role and text in it."""
SPEAKERS = {role: role for role in ROLES} | {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
}
"""Who speaks, by the names that are in use."""


class Talk(NamedTuple):
    """A dialogue."""

    turns: list[Turn]
    scored: list[bool]
    """Of each turn: whether it is an answer to train on."""


def read_talks(path: Path) -> Iterator[Talk]:
    """The dialogues of a file of JSON lines. Raises DamageError for a line that is none, UsageError
    for a file that cannot be opened or is an array."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}); give JSON lines") from None
    if lines and lines[0].removeprefix(BOM).startswith(b"["):
        raise UsageError(f"{path}: an array; write lines: jq -c '.[]' {path} > talks.jsonl")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _talk(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise DamageError(
                f"{path}, line {number}: {error or 'nested too deeply'}; mend the line or take it "
                "out"
            ) from None


def _talk(data: Any) -> Talk:
    """The dialogue of an object. Raises ValueError for what is none."""
    form = next((key for key in FORMS if isinstance(data, dict) and key in data), None)
    if form is None:
        raise ValueError(f"no dialogue: it has neither of the fields {', '.join(FORMS)}")
    if not isinstance(data[form], list) or not data[form]:
        raise ValueError(f"no dialogue: its {form} are no list of turns")
    role, content = FORMS[form]
    talk = Talk([], [])
    for turn in data[form]:
        found = turn if isinstance(turn, dict) else {}
        speaker, text = found.get(role), found.get(content)
        if not isinstance(speaker, str) or speaker not in SPEAKERS:
            raise ValueError(f"{role} is {speaker!r}: must be one of {', '.join(SPEAKERS)}")
        if not isinstance(text, str):
            raise ValueError(f"{content} of a turn is {type(text).__name__}: must be a text")
        said = SPEAKERS[speaker]
        talk.turns.append((said, text))
        if (weight := found.get("weight", 1)) not in (0, 1):
            raise ValueError(f"weight of a turn is {weight!r}: must be 0 or 1")
        talk.scored.append(said == "assistant" and weight != 0)
    return talk


def masked(form: SpecialTokens, talk: Talk) -> Masked:
    """The tokens of a dialogue, without END-OF-DOCUMENT, and which of them are scored: what an
    answer says and its end, and not the token before it, which is the program's to write."""
    ids: list[int] = []
    scored: list[int] = []
    for (role, content), counts in zip(talk.turns, talk.scored, strict=True):
        written = form.turn(role, content)
        ids += written
        scored += [0] + [int(counts)] * (len(written) - 1)
    return Masked(ids, scored)


def is_held_out(talk: Talk, fraction: float) -> bool:
    """Whether a dialogue is of the validation split: by a hash of its turns, wherever it stands."""
    return text_hash(json.dumps(talk.turns).encode()) < fraction * 2**64


def prepare_talks(
    files: Iterable[Path],
    encoding: "tiktoken.Encoding",
    output: Path,
    validation_fraction: float = 0.1,
) -> tuple[CorpusManifest, CorpusManifest]:
    """The dialogues of all files as corpora in `output` and, those held out, `output`-validation.

    A tokenizer without tokens for turns gets them, in `output`-tokenizer.json. Does nothing where
    these very dialogues lie there already. Raises what read_talks and prepare raise, and UsageError
    where either split has no dialogue.
    """
    talks = [talk for path in files for talk in read_talks(path)]
    encoding = with_turns(encoding)
    form, path = SpecialTokens(encoding), beside(output, "-tokenizer.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != described(encoding):
        write_file(path, described(encoding))
    made = []
    for split, folder in (("train", output), ("validation", beside(output, "-validation"))):
        kept = [t for t in talks if is_held_out(t, validation_fraction) == (folder != output)]
        if not any(any(talk.scored) for talk in kept):
            raise UsageError(
                f"{folder}: none of {len(talks)} dialogues with an answer is of this split; "
                f"give more of them, or another validation fraction than {validation_fraction:g}"
            )
        documents = (masked(form, talk) for talk in kept)
        made.append(prepare(folder, documents=documents, vocabulary=path, split=split))
    return made[0], made[1]

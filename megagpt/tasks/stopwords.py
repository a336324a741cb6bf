"""Words that end no passage of LAMBADA: English words of grammar, which GPT-2's filter leaves out.

The GPT-2 paper (section 3.3) does not print its list. This one holds articles, pronouns,
prepositions, conjunctions, auxiliaries and a few adverbs.
"""

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import tiktoken

WORDS = frozenset(
    """a an the this that these those some any each every either neither both all such no not none
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his
    himself she her hers herself it its itself they them their theirs themselves who whom whose
    which what where when why how
    about above across after against along among around as at before behind below beneath beside
    between beyond by down during except for from in inside into like near of off on onto out
    outside over past since through to toward towards under until up upon with within without
    and but or nor so yet if because although though while unless than whether then
    am is are was were be been being have has had having do does did doing can could will would
    shall should may might must ought
    just very too also only even still again there here once more most much many few own same other
    another s t d ll re ve m don didn doesn isn wasn couldn wouldn""".split()
)


def stopword_ids(encoding: "tiktoken.Encoding") -> list[int]:
    """The tokens of an encoding that are such a word, or hold no letter or digit at all."""
    found = []
    for token, rank in encoding._mergeable_ranks.items():
        text = token.decode("utf-8", errors="replace")
        if text.strip().lower() in WORDS or not re.search(r"\w", text):
            found.append(rank)
    return sorted(found)

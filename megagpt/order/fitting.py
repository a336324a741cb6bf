"""Whether the corpora of a run go together, and fit its model (L1)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megagpt.config import ModelConfig, RunConfig
from megagpt.corpus.manifest import CorpusManifest
from megagpt.errors import UsageError
from megagpt.order.windows import TokenWindows

if TYPE_CHECKING:
    from megagpt.order.loader import TokenLoader


def check_vocabulary(config: RunConfig, loaders: "Sequence[TokenLoader]") -> None:
    """Raises UsageError when the data's tokens do not fit the model's vocabulary, or were made by
    another tokenizer than those of the first loader."""
    first = loaders[0].stores[0].manifest
    for loader in loaders:
        for store in loader.stores:
            check_kind(config.model, store.manifest)
        manifest = loader.stores[0].manifest
        if manifest.vocab_size != config.model.vocab_size:
            raise UsageError(
                f"{manifest.folder}: its tokenizer {manifest.tokenizer!r} has "
                f"{manifest.vocab_size} tokens, but model.vocab_size = {config.model.vocab_size}; "
                f"set model.vocab_size = {manifest.vocab_size}, or prepare the corpus with the "
                "model's tokenizer"
            )
        if not _same_tokenizer(manifest, first):
            raise UsageError(
                f"{manifest.folder}: its tokenizer {manifest.tokenizer!r} is not that of "
                f"{first.folder}, {first.tokenizer!r}, though as large; prepare the corpus with "
                "the tokenizer of the training data"
            )


def check_kind(model: ModelConfig, manifest: CorpusManifest) -> None:
    """Raises UsageError for samples that begin or end otherwise than those of the model."""
    start = -1 if model.start_token is None else model.start_token
    if start >= 0 > manifest.record_start:
        raise UsageError(
            f"{manifest.folder}: its windows begin with any token, but model.family = "
            f'"{model.family}" reads images behind a start vector; prepare images with '
            "data_prep/images.py, or choose another model"
        )
    if manifest.record_start >= 0 > start:
        raise UsageError(
            f"{manifest.folder}: holds images behind a start vector, which model.family = "
            f'"{model.family}" has not; choose a model of Image GPT (family = "igpt")'
        )
    if model.classes and not manifest.record_length:
        raise UsageError(
            f"{manifest.folder}: is of documents, but model.classes = {model.classes} needs "
            "records that end in their class; write them with megagpt.corpus.forms"
        )


def _same_tokenizer(one: CorpusManifest, other: CorpusManifest) -> bool:
    """Whether ids mean the same in both corpora, as far as is known.

    An import may not know its tokenizer; its vocabulary must fit at least.
    """
    sizes = {(manifest.vocab_size, manifest.end_of_document) for manifest in (one, other)}
    return len(sizes) == 1 and len({one.fingerprint, other.fingerprint} - {""}) <= 1


def check_sources(stores: Sequence[TokenWindows]) -> None:
    """Raises UsageError unless the sources share a tokenizer and differ in what they hold."""
    first = stores[0].manifest
    for i, store in enumerate(stores):
        if not _same_tokenizer(store.manifest, first):
            raise UsageError(
                f"{store.folder} is tokenized with {_tokenizer(store.manifest)}, but "
                f"{first.folder} with {_tokenizer(first)}; all sources of a run must share one "
                "tokenizer: prepare one of them again"
            )
        for other in stores[:i]:
            if other.fingerprint == store.fingerprint:
                raise UsageError(
                    f"{store.folder}: holds the same tokens as {other.folder}; list a corpus once, "
                    "with the sum of the weights"
                )


def _tokenizer(manifest: CorpusManifest) -> str:
    """A corpus's tokenizer for a message."""
    name = f"{manifest.tokenizer_name} ({manifest.vocab_size} tokens"
    return f"{name}, fingerprint {manifest.fingerprint[:12] or 'unknown'})"

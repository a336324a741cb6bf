"""From sample numbers to the micro-batches of a data-parallel rank (L1; torch only for tensors).

    sample number -> (source, draw)   mixture.py
    (source, draw) -> window          permutation.py
    window -> tokens                  windows.py

Each arrow is a pure function of (sources and weights, n_ctx, seed), so the number of samples
consumed is the whole state of the data: nothing else is saved, and nothing depends on ranks,
micro-batches, threads or the point where a run resumed.
"""

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megagpt.config import RunConfig
from megagpt.corpus.manifest import CorpusManifest
from megagpt.errors import UsageError
from megagpt.order.augment import Augment
from megagpt.order.fitting import check_sources, check_vocabulary
from megagpt.order.mixture import Mixture
from megagpt.order.permutation import shuffle
from megagpt.order.windows import TokenWindows
from megagpt.tokenizer import load_tokenizer
from megagpt.tokenizer.portable import tokenizer_content

if TYPE_CHECKING:
    import tiktoken
    from torch import Tensor

    MicroBatch = tuple[Tensor, Tensor]

log = logging.getLogger(__name__)

MASKED = -100
"""What stands in the place of a target that is not scored, as in torch's cross_entropy."""


@dataclass(frozen=True, slots=True)
class Samples:
    """A block of samples by where they come from; three arrays int64 (N,)."""

    source: np.ndarray
    """Index into TokenLoader.stores."""
    draw: np.ndarray
    """Earlier samples of the same source."""
    window: np.ndarray
    """Number of the window in its source."""


class TokenLoader:
    """The samples of a run, in their order.

    sources: (folder, weight) pairs; weights of any scale. n_ctx: tokens of an input; a sample has
    n_ctx + 1. shuffle: False reads the windows of each source in the order of its files. changes:
    (first sample, weights) in ascending order, for a mixture that changes during the run.
    sizes: False where others compare the sizes of the files.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Path, float]],
        n_ctx: int,
        seed: int,
        shuffle: bool = True,
        changes: Sequence[tuple[int, Sequence[float]]] = (),
        sizes: bool = True,
    ) -> None:
        """Raises UsageError for sources that do not go together, DamageError for damaged ones."""
        self.n_ctx, self.seed, self.shuffle = n_ctx, seed, shuffle
        self.stores = [TokenWindows(Path(path), sizes) for path, _ in sources]
        check_sources(self.stores)
        self._names = unique_names([store.folder for store in self.stores])
        self._n_windows = [store.n_windows(n_ctx) for store in self.stores]
        keys = [store.fingerprint for store in self.stores]
        weights = [weight for _, weight in sources]
        self.mixture = Mixture(weights, keys, changes)
        self._spans = [(0, weights), *changes]
        # The first 8 bytes of each source's fingerprint, the name that digest() hashes.
        self._marks = np.array([int(key[:16], 16) for key in keys], np.uint64)
        self.augment = Augment()
        """How images are changed when they are read for training."""
        self._ahead: tuple[tuple[int, ...], Future[list[MicroBatch]]] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def fingerprint(self, samples: int) -> str:
        """Hex digest of all that decides the order of the first `samples` samples, except how the
        sources are listed. A change of the mixture counts from its first sample on, and a source
        from the first weight on that it is given."""
        return self._named(samples, resting=False)

    def known_fingerprints(self, samples: int) -> tuple[str, str]:
        """Under which names checkpoints may know that order: the present one, and that of earlier
        versions, for which a source that rested was part of the past."""
        return self._named(samples, resting=False), self._named(samples, resting=True)

    def _named(self, samples: int, resting: bool) -> str:
        digest = hashlib.sha256(f"{self.n_ctx} {self.seed} {self.shuffle}".encode())
        if self.augment:
            digest.update(f" {self.augment}".encode())
        for first, weights in self._spans:
            if first and first >= samples:
                break
            total = sum(weights)
            shares = sorted(
                f"{store.fingerprint} {weight / total:.12g}"
                for store, weight in zip(self.stores, weights, strict=True)
                if weight or resting
            )
            digest.update(f"\n{first} {' '.join(shares)}".encode())
        return digest.hexdigest()

    @property
    def masked(self) -> bool:
        """Whether a source has targets that are not scored."""
        return any(store.masks for store in self.stores)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer that all sources share, as megagpt.tokenizer.load_tokenizer takes it."""
        return self._vocabulary.tokenizer

    @property
    def tokenizer_fingerprint(self) -> str:
        """megagpt.tokenizer.fingerprint of it; "" where no source knows it."""
        return self._vocabulary.fingerprint

    @cached_property
    def encoding(self) -> "tiktoken.Encoding":
        """The tokenizer itself. Raises what load_tokenizer raises."""
        return load_tokenizer(self.tokenizer_name, self.tokenizer_fingerprint)

    def vocabulary(self) -> bytes:
        """The tokenizer.json that goes with weights trained on these samples; b"" where no source
        knows its tokenizer, or it is not to be had here."""
        if not self.tokenizer_fingerprint:
            return b""
        try:
            return tokenizer_content(self.tokenizer_name, self.tokenizer_fingerprint)
        except UsageError as error:
            log.warning("checkpoints will not carry their tokenizer: %s", error)
            return b""

    @property
    def _vocabulary(self) -> CorpusManifest:
        """A source that knows its tokenizer, where there is one."""
        manifests = [store.manifest for store in self.stores]
        return next((known for known in manifests if known.fingerprint), manifests[0])

    @property
    def vocab_size(self) -> int:
        """Tokens of that tokenizer's vocabulary."""
        return self.stores[0].manifest.vocab_size

    @property
    def end_of_document(self) -> int:
        """Id of the token that follows each document; -1: there is none."""
        return self.stores[0].manifest.end_of_document

    @property
    def n_windows(self) -> int:
        """Windows of all sources together."""
        return sum(self._n_windows)

    def places(self, first: int, count: int) -> Samples:
        """Where samples first ... first + count - 1 come from; reads no tokens."""
        source, draw = self.mixture.assign(first, count)
        window = np.empty_like(draw)
        for i, n in enumerate(self._n_windows):
            members = np.flatnonzero(source == i)
            if members.size and self.shuffle:
                key = self.stores[i].fingerprint
                window[members] = shuffle(draw[members], n, self.seed, key)
            elif members.size:
                window[members] = draw[members] % n
        return Samples(source, draw, window)

    def samples(self, first: int, count: int) -> np.ndarray:
        """Samples first ... first + count - 1 as training reads them: int64 (count, n_ctx + 1)."""
        members = np.arange(count)
        rows = self._read(self.places(first, count), members)
        return self.as_trained(rows, first + members).astype(np.int64)

    def as_trained(self, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """The rows (N, n_ctx + 1) of samples by number as training reads them."""
        return self.augment.apply(rows, self.seed, numbers.tolist()) if self.augment else rows

    def augment_images(self, augment: Augment) -> None:
        """Changes samples as `augment` says. Raises UsageError for what is no corpus of images."""
        for store in self.stores if augment else ():
            if store.manifest.record_start < 0 or store.masks:
                raise UsageError(
                    f"{store.folder}: data.flip and data.shift change images, and these are "
                    "others; leave both out"
                )
            augment.side(self.n_ctx)
        self.augment = augment

    def _read(self, places: Samples, members: np.ndarray) -> np.ndarray:
        """The tokens of some samples of a block: (len(members), n_ctx + 1), uint16 or int32."""
        source, window = places.source[members], places.window[members]
        if len(self.stores) == 1:
            return self.stores[0].windows(window, self.n_ctx)
        # One vocabulary, and so one dtype.
        tokens = np.empty((len(members), self.n_ctx + 1), self.stores[0].dtype)
        for i, store in enumerate(self.stores):
            here = np.flatnonzero(source == i)
            if here.size:
                tokens[here] = store.windows(window[here], self.n_ctx)
        return tokens

    def _scored(self, places: Samples, members: np.ndarray) -> np.ndarray:
        """Which targets of some samples of a block are scored: bool (len(members), n_ctx)."""
        source, window = places.source[members], places.window[members]
        scored = np.empty((len(members), self.n_ctx), bool)
        for i, store in enumerate(self.stores):
            here = np.flatnonzero(source == i)
            if here.size:
                scored[here] = store.scored(window[here], self.n_ctx)
        return scored

    def micro_batches(
        self, first: int, count: int, rank: int, ranks: int, micro_batch: int
    ) -> Iterator["MicroBatch"]:
        """The micro-batches (x, y) of data-parallel rank `rank`; int64 (micro_batch, n_ctx) each.

        Micro-batch i holds the samples first + (i * ranks + rank) * micro_batch + [0, micro_batch);
        y is x shifted by one token, MASKED where a target is not scored. Every rank gets equally
        many: where there are not enough, the last of some ranks are samples of the same step
        again, for the engine to weigh at nothing. A step that prefetch() was given is taken from
        there.
        """
        wanted = (first, count, rank, ranks, micro_batch)
        assert count % micro_batch == 0 and 0 <= rank < ranks, wanted
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == wanted:
            return iter(ahead[1].result())
        return self._cut(*wanted)

    def prefetch(self, first: int, count: int, rank: int, ranks: int, micro_batch: int) -> None:
        """Read a step ahead in a thread, into pinned memory where there is a CUDA device.

        The next call of micro_batches() with the same arguments gets the result, or the error that
        reading met; any other call forgets it. One step is held at a time.
        """
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="megagpt-data")
        wanted = (first, count, rank, ranks, micro_batch)
        assert count % micro_batch == 0 and 0 <= rank < ranks, wanted
        self._ahead = (wanted, self._thread.submit(lambda: list(self._cut(*wanted))))

    def _cut(
        self, first: int, count: int, rank: int, ranks: int, micro_batch: int
    ) -> Iterator["MicroBatch"]:
        import torch

        pinned = torch.cuda.is_available()
        places = self.places(first, count)
        for round_ in range(0, count, ranks * micro_batch):
            start = (round_ + rank * micro_batch) % count
            members = np.arange(start, start + micro_batch)
            tokens = self.as_trained(self._read(places, members), first + members)
            # Embeddings take int64; numpy converts and copies in one pass.
            x = torch.from_numpy(tokens[:, :-1].astype(np.int64))
            y = torch.from_numpy(tokens[:, 1:].astype(np.int64))
            if self.masked:
                y[torch.from_numpy(~self._scored(places, members))] = MASKED
            yield (x.pin_memory(), y.pin_memory()) if pinned else (x, y)

    def digest(self, first: int, count: int) -> str:
        """16 hex digits that name the samples first ... first + count - 1 and their order.

        It hashes (fingerprint of the source, window) of each sample, and n_ctx, instead of the
        tokens: a fingerprint covers the checksums of all shards, so it stands for them, and every
        rank computes the digest of the whole step without reading what the others read.
        """
        places = self.places(first, count)
        names = np.stack([self._marks[places.source], places.window.astype(np.uint64)])
        changed = f" {self.augment}" if self.augment else ""
        digest = hashlib.blake2b(f"{self.n_ctx}{changed}".encode(), digest_size=8)
        digest.update(names.astype("<u8").tobytes())
        return digest.hexdigest()

    def consumed(self, samples: int) -> list[dict[str, object]]:
        """What the first `samples` samples took from each source, in the order of the list.

        path, name (unique_names of the folders), samples, tokens (targets: samples * n_ctx) and
        epochs (samples / windows of the source).
        """
        return [
            {
                "path": str(store.folder),
                "name": name,
                "samples": count,
                "tokens": count * self.n_ctx,
                "epochs": count / n,
            }
            for store, name, n, count in zip(
                self.stores,
                self._names,
                self._n_windows,
                self.mixture.counts(samples),
                strict=True,
            )
        ]

    def close(self) -> None:
        """Stop reading ahead and close the files."""
        self._ahead = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
        for store in self.stores:
            store.close()


def unique_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder, no two alike: its own, with those above it where it takes them."""
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    found = []
    for path in paths:
        others = [other.parts for other in paths if other != path]
        length = 1
        while any(other[-length:] == path.parts[-length:] for other in others):
            length += 1
        found.append("/".join(path.parts[-length:]))
    return found


def training_loader(config: RunConfig, sizes: bool = True) -> TokenLoader:
    """The samples that a run trains on. Raises what TokenLoader raises."""
    data, n_ctx = config.data, config.model.n_ctx
    sources = [(Path(source.path), source.weight) for source in data.train]
    changes = [(change.at_tokens // n_ctx, change.weights) for change in data.changes]
    loader = TokenLoader(sources, n_ctx, config.seed, changes=changes, sizes=sizes)
    loader.augment_images(Augment(data.flip, data.shift))
    return loader


def validation_loaders(config: RunConfig, sizes: bool = True) -> list[TokenLoader]:
    """The samples of each validation set. Raises what TokenLoader raises."""
    sources = config.data.validation
    n_ctx = config.model.n_ctx
    return [TokenLoader([(Path(s.path), 1.0)], n_ctx, 0, sizes=sizes) for s in sources]


def check_corpora(config: RunConfig) -> None:
    """Opens and closes all corpora of a run. Raises what TokenLoader and check_vocabulary raise."""
    loaders = [training_loader(config), *validation_loaders(config)]
    try:
        check_vocabulary(config, loaders)
    finally:
        for loader in loaders:
            loader.close()

"""Fixed-shape batches of documents, in an order that depends on seed and step alone.

`BatchStream` pads documents of similar length to one length per batch. `ContiguousStream` cuts
running text into windows, so that the LSTM state can be carried from batch to batch as in bilm-tf.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from flax import struct

from elmo_jax._moved import renamed_arguments, renamed_method
from elmo_jax.data.characters import GROUP_SIZE, UniqueWords, character_id_table, find_unique_words
from elmo_jax.data.text import BOS, EOS, PAD, UNK, Vocabulary
from elmo_jax.errors import InputError

DIRECTIONS = 2  # forward, then backward
ALL = slice(None)  # all rows of a batch
ROUND = 4  # bucket bounds are multiples of this number
_RUN = 8  # so many consecutive batches have one shape, so that one call can run several


@struct.dataclass
class Batch:
    """Padded documents, each between ``<S>`` and ``</S>``; a JAX pytree.

    Attributes:
        words: int32 ids ``[B, T]``, 0 beyond the length.
        lengths: int32 ``[B]``, tokens per row including ``<S>`` and ``</S>``; 0 in filler rows.
        labels: int32 classes ``[B]``, or None.
        weight: float32 ``[B]``, 1 for documents and 0 for the filler rows that keep shapes fixed.
        chars: int32 character ids ``[B, T, C]``, 0 beyond the length, or None.
        unique_words: `UniqueWords` of exactly these words, or None.

    Examples:
        >>> batch = Batch.of([[7, 8], [9]])
        >>> batch.words.tolist(), batch.lengths.tolist()
        ([[1, 7, 8, 2], [1, 9, 2, 0]], [4, 3])
    """

    words: Any  # NumPy arrays on the host, JAX arrays on the device
    lengths: Any
    labels: Any
    weight: Any
    chars: Any = None
    unique_words: Any = None
    BATCH_AXIS: ClassVar[int] = 0

    @classmethod
    def of(
        cls,
        sentences: Sequence[Sequence[int] | np.ndarray],
        labels: Sequence[int] | np.ndarray | None = None,
        shape: tuple[int, int] | None = None,
    ) -> "Batch":
        """Return a batch of these token ids, padded to `shape` [B, T], or to the longest row if None."""
        rows, steps = shape or (len(sentences), 2 + max(map(len, sentences), default=0))
        words = np.full((rows, steps), PAD, np.int32)
        lengths, classes = np.zeros((2, rows), np.int32)
        for i, ids in enumerate(sentences):
            lengths[i] = len(ids) + 2
            words[i, : lengths[i]] = BOS, *ids, EOS
        if labels is not None:
            classes[: len(sentences)] = labels
        return cls(words, lengths, None if labels is None else classes, (lengths > 0).astype(np.float32))


@struct.dataclass
class Window:
    """The next U + 1 tokens of running text in every row; a JAX pytree.

    Attributes:
        words: int32 ids ``[D, B, U + 1]``. A sentence is ``<S> w1 ... wn </S>`` forward and
            ``</S> wn ... w1 <S>`` backward, both at the same positions.
        weight: float32 ``[D, B, U]``, 0 for the last token of a sentence, which predicts nothing, else 1.
        chars: int32 character ids ``[D, B, U, C]`` of all but the last token, or None.
        unique_words: `UniqueWords` of exactly these words, or None.
    """

    words: Any
    weight: Any
    chars: Any = None
    unique_words: Any = None
    BATCH_AXIS: ClassVar[int] = 1


@renamed_arguments(spellings="character_ids", classes="vocabulary_size", longest="max_length")
@dataclass(frozen=True)
class Documents:
    """Token ids of all documents, end to end, and a class for each document.

    Attributes:
        ids: int32 ``[tokens]``.
        offsets: int64 ``[N + 1]``; document n is ``ids[offsets[n]:offsets[n + 1]]``.
        labels: int32 classes ``[N]``.
        character_ids: Character ids ``[ids, C]`` of every token id, or None for models of words.
        vocabulary_size: V. Ids from V on have characters, but are ``<UNK>`` in `Batch.words`.
        max_length: Longer documents are truncated to this number of tokens; None truncates none.
        group_size: Group size of `UniqueWords` on a CPU.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    character_ids: np.ndarray | None = None
    vocabulary_size: int | None = None
    max_length: int | None = None
    group_size: int = GROUP_SIZE

    @classmethod
    def of(
        cls,
        sentences: Sequence[Sequence[str]],
        vocabulary: Vocabulary,
        labels: Sequence[int] | np.ndarray | None = None,
        with_characters: bool = False,
        max_length: int | None = None,
    ) -> "Documents":
        """Return documents of these tokens; without labels, all are of class 0.

        Args:
            sentences: Tokens of each document.
            vocabulary: Token ids.
            labels: Classes ``[N]``.
            with_characters: Add the character ids of every word; unknown words keep their characters.
            max_length: See the attribute.
        """
        code_of: dict[str, int] = {}
        codes = [code_of.setdefault(token, len(code_of)) for sentence in sentences for token in sentence]
        offsets = np.cumsum([0, *map(len, sentences)])
        classes = np.zeros(len(sentences), np.int32) if labels is None else np.asarray(labels, np.int32)
        documents = cls(np.array(codes, np.int32), offsets, classes, max_length=max_length)
        return documents.with_vocabulary(list(code_of), vocabulary, with_characters)

    def with_vocabulary(
        self, tokens: Sequence[str], vocabulary: Vocabulary, with_characters: bool = False
    ) -> "Documents":
        """Return the documents with the ids of a vocabulary.

        Args:
            tokens: Token of each present id.
            vocabulary: Token ids.
            with_characters: Add the character ids of every word; unknown words keep their characters.
        """
        ids = vocabulary.ids(tokens)
        if not with_characters:
            return replace(self, ids=ids[self.ids])
        unknown = np.flatnonzero(ids == UNK)
        ids[unknown] = len(vocabulary) + np.arange(len(unknown), dtype=ids.dtype)
        table = character_id_table([*vocabulary.tokens, *(tokens[i] for i in unknown.tolist())])
        return replace(self, ids=ids[self.ids], character_ids=table, vocabulary_size=len(vocabulary))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 ``[N]``, tokens per document without ``<S>`` and ``</S>``."""
        lengths = np.diff(self.offsets)
        return lengths if self.max_length is None else np.minimum(lengths, self.max_length)

    @cached_property
    def unknown_fraction(self) -> float:
        """Fraction of the tokens outside the vocabulary."""
        size = np.iinfo(np.int32).max if self.vocabulary_size is None else self.vocabulary_size
        # In blocks, because they may be memory-mapped.
        blocks = np.array_split(self.ids, 1 + (len(self.ids) >> 24))
        return sum(int(((ids == UNK) | (ids >= size)).sum()) for ids in blocks) / max(len(self.ids), 1)

    def take(self, indices: np.ndarray) -> "Documents":
        """Return the documents at these indices, in this order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][indices] - offsets[:-1], lengths)
        ids, labels = self.ids[index], self.labels[indices]
        return replace(self, ids=ids, offsets=offsets, labels=labels, max_length=None)

    def subset(self, fraction: float, seed: int) -> "Documents":
        """Return a random fraction of every class, at least one document each, in the original order."""
        rng = np.random.default_rng(seed)
        classes = [rng.permutation(np.flatnonzero(self.labels == c)) for c in np.unique(self.labels)]
        sampled = [indices[: max(1, round(fraction * len(indices)))] for indices in classes]
        return self.take(np.sort(np.concatenate(sampled)))

    share = renamed_method("share", "subset")

    def batch(self, indices: np.ndarray, steps: int, group_scale: int = 0) -> Batch:
        """Return documents ``[..., B]`` as a batch with leaves ``[..., B, T]``; index -1 is a filler row.

        With a `group_scale` it has `UniqueWords`, in groups of that many times `group_size`.
        """
        real = indices >= 0
        lengths = np.where(real, self.lengths[indices] + 2, 0).astype(np.int32)  # [..., B]
        t, n = np.arange(steps), lengths[..., None]
        inner = (t > 0) & (t < n - 1)  # [..., B, T]
        ids = np.full(inner.shape, PAD, np.int32)
        ids[inner] = self.ids[(self.offsets[indices][..., None] + t - 1)[inner]]
        ids[..., 0] = np.where(real, BOS, PAD)
        ids[(t == n - 1) & (n > 0)] = EOS
        labels = np.where(real, self.labels[indices], 0).astype(np.int32)
        characters = self.characters(ids, 2, group_scale)
        return Batch(self.known_words(ids), lengths, labels, real.astype(np.float32), *characters)

    def known_words(self, ids: np.ndarray) -> np.ndarray:
        """Return int32 token ids with ``<UNK>`` in place of ids beyond the vocabulary."""
        if self.vocabulary_size is None:
            return ids
        return np.where(ids < self.vocabulary_size, ids, UNK).astype(np.int32)

    def characters(
        self, ids: np.ndarray, axes: int, group_scale: int = 0
    ) -> tuple[np.ndarray | None, UniqueWords | None]:
        """Return character ids ``[..., C]``, and the unique words of steps with `axes` axes."""
        if self.character_ids is None:
            return None, None
        unique = find_unique_words(ids, axes, group_scale * self.group_size) if group_scale else None
        return self.character_ids[ids], unique


class StepChunk(NamedTuple):
    """Up to K batches of one shape, run by one multi-step call."""

    batches: Any  # a Batch or another pytree, with leaves [K, ...]
    count: int  # batches to run; the remaining ones are padding


class Stream(Protocol):
    """Batches that the training loop can read from any step on."""

    batch_size: int
    steps_per_epoch: int
    group_scale: int  # factor of the group size of `UniqueWords`; `feed` sets it for the device

    def chunks(self, first: int, last: int, rows: slice = ALL) -> Iterator[StepChunk]:
        """Yield these `rows` of the batches of steps `first` to `last` - 1, counted over all epochs."""
        ...

    def document_indices(self, step: int) -> np.ndarray:
        """Return the documents of a step, for messages about it."""
        ...

    def shapes(self) -> list[Any]:
        """Return a chunk's batches of every shape known in advance, or none if there is only one shape."""
        ...


@renamed_arguments(steps_per_dispatch="steps_per_call")
class BatchStream:
    """Batches of padded documents; the batch of a step depends on (seed, step) alone.

    An epoch contains every document once. Documents of similar length share a batch, and leftovers join
    the next longer ones. Up to eight batches of one shape follow each other; the rest is shuffled.

    Args:
        documents: At least one document.
        batch_size: B.
        seed: Random seed of the order; None sorts documents by length, for evaluation.
        bounds: Padded lengths; None uses `bucket_bounds`. Longer documents get one more bound.
        steps_per_call: K, at most 8; does not change the order.

    Examples:
        >>> docs = Documents(np.arange(4, 14, dtype=np.int32), np.array([0, 3, 10]), np.array([0, 1]))
        >>> stream = BatchStream(docs, batch_size=2)
        >>> stream.steps_per_epoch, [chunk.batches.words.shape for chunk in stream.chunks(0, 1)]
        (1, [(1, 2, 12)])
    """

    def __init__(
        self,
        documents: Documents,
        batch_size: int,
        seed: int | None = None,
        bounds: tuple[int, ...] | None = None,
        steps_per_call: int = 1,
    ):
        steps = documents.lengths + 2
        bounds = bounds or bucket_bounds(steps, batch_size)
        if steps.max() > bounds[-1]:
            bounds = (*bounds, -(-int(steps.max()) // ROUND) * ROUND)
        self.documents, self.batch_size, self.seed = documents, batch_size, seed
        self.bounds, self.steps_per_call, self.group_scale = bounds, min(steps_per_call, _RUN), 1
        by_length = np.argsort(steps, kind="stable")
        ends = np.searchsorted(steps[by_length], bounds, "right")
        batches = np.diff(_count_batches(ends, batch_size), prepend=0).tolist()
        self._buckets = list(zip(bounds, np.split(by_length, ends[:-1]), batches, strict=True))
        self.steps_per_epoch = sum(batches)
        self.tokens_per_epoch = int(documents.lengths.sum())

    def like(self, documents: Documents) -> "BatchStream":
        """Return other documents in batches of the same shapes, sorted by length, for evaluation."""
        return BatchStream(documents, self.batch_size, bounds=self.bounds, steps_per_call=self.steps_per_call)

    @property
    def padding(self) -> float:
        """Fraction of all positions, filler rows included, that hold no token."""
        positions = sum(count * self.batch_size * bound for bound, _, count in self._buckets)
        return 1 - (self.tokens_per_epoch + 2 * len(self.documents)) / positions

    def chunks(self, first: int, last: int, rows: slice = ALL) -> Iterator[StepChunk]:
        """See `Stream.chunks`."""
        epoch, skip = divmod(first, self.steps_per_epoch)
        while first < last:
            for bound, batches in self._epoch(epoch):
                batches, skip = batches[skip:][: last - first], max(0, skip - len(batches))
                for i in range(0, len(batches), self.steps_per_call):
                    yield self._stack(batches[i : i + self.steps_per_call], bound, rows)
                first += len(batches)
            epoch += 1

    dispatches = renamed_method("dispatches", "chunks")
    rows = renamed_method("rows", "document_indices")

    def document_indices(self, step: int) -> np.ndarray:
        """See `Stream.document_indices`."""
        epoch, i = divmod(step, self.steps_per_epoch)
        return [indices for _, batches in self._epoch(epoch) for indices in batches][i]

    def shapes(self) -> list[Batch]:
        """See `Stream.shapes`."""
        if self.documents.character_ids is not None:
            chunks = self.chunks(0, min(512, self.steps_per_epoch))  # a sample, because all would take long
            found = {(b.words.shape, b.unique_words and b.unique_words.first.shape): b for b, _ in chunks}
            return list(found.values())
        buckets = [(bound, indices[: self.batch_size]) for bound, indices, count in self._buckets if count]
        return [self._stack([indices], bound, ALL).batches for bound, indices in buckets]

    def order(self) -> np.ndarray:
        """Return the document numbers ``[N]`` in the order of the first epoch."""
        return np.concatenate([indices for _, batches in self._epoch(0) for indices in batches])

    def _epoch(self, epoch: int) -> list[tuple[int, list[np.ndarray]]]:
        """Return runs of batches with one bound: the bound, and the document numbers of each batch."""
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        runs, leftover = [], np.array([], int)
        for bound, bucket, count in self._buckets:
            indices = np.concatenate([leftover, bucket])
            indices = indices if rng is None else rng.permutation(indices)
            batches = [indices[i * self.batch_size :][: self.batch_size] for i in range(count)]
            leftover = indices[count * self.batch_size :]
            if rng is not None:  # the partly filled batch must not always be the bucket's last
                batches = [batches[i] for i in rng.permutation(len(batches))]
            runs += [(bound, batches[i : i + _RUN]) for i in range(0, len(batches), _RUN)]
        return runs if rng is None else [runs[i] for i in rng.permutation(len(runs))]

    def _stack(self, batches: list[np.ndarray], bound: int, rows: slice) -> StepChunk:
        indices = np.full((self.steps_per_call, self.batch_size), -1)  # [K, B]
        for k, batch in enumerate(batches):
            indices[k, : len(batch)] = batch
        indices[len(batches) :] = indices[0]
        group_scale = self.group_scale if rows == ALL else 0  # unique words are those of a complete batch
        return StepChunk(self.documents.batch(indices[:, rows], bound, group_scale), len(batches))


def _count_batches(documents: np.ndarray, batch_size: int) -> np.ndarray:
    """Turn cumulative document counts of buckets into batch counts; leftovers join the next bucket."""
    return np.where(documents < documents[-1], documents, documents[-1] + batch_size - 1) // batch_size


def bucket_bounds(
    lengths: np.ndarray, batch_size: int = 1, max_buckets: int = 12, bucket_cost: int = 20_000
) -> tuple[int, ...]:
    """Return the padded lengths with the fewest positions per epoch, by dynamic programming.

    Args:
        lengths: Steps per document ``[N]``, at least one.
        batch_size: B.
        max_buckets: Maximum number of bounds.
        bucket_cost: Positions per epoch that another bucket must save to be worth its compilation.

    Examples:
        >>> bucket_bounds(np.repeat([3, 4, 20], [9000, 9000, 9000]))
        (4, 20)
    """
    counts = np.bincount(-(-lengths // ROUND))
    bound = np.flatnonzero(counts)  # candidates, in units of ROUND
    # Number of positions before each candidate.
    batches = _count_batches(np.concatenate([[0], np.cumsum(counts[bound])]), batch_size)
    # span[j, i]: positions of one bucket over candidates i to j.
    span = (batches[1:, None] - batches[None, :-1]) * (batch_size * bound[:, None] * float(ROUND))
    span = np.where(np.tri(len(bound), dtype=bool), span, np.inf)
    # Fewest positions of all documents up to each candidate, and the bounds that lead to them.
    positions, bounds = span[:, 0], [(b,) for b in bound.tolist()]
    found = [(positions[-1], bounds[-1])]
    for buckets in range(1, min(max_buckets, len(bound))):
        total = np.concatenate([[np.inf], positions[:-1]]) + span
        positions, start = total.min(1), total.argmin(1)
        bounds = [(*bounds[i - 1], b) for i, b in zip(start, bound.tolist(), strict=True)]
        found.append((positions[-1] + bucket_cost * buckets, bounds[-1]))
    return tuple(b * ROUND for b in min(found, key=lambda pair: pair[0])[1])


class ContiguousStream:
    """Windows of running text; the window of a step depends on (seed, step) alone.

    The sentences of an epoch, end to end in random order, are cut into B equal rows. A window
    continues the previous one in every row. Tokens after the last complete window are unused.

    Args:
        documents: Sentences; InputError if they have fewer than B (U + 1) tokens with ``<S>``, ``</S>``.
        batch_size: B.
        unroll: U, the steps of a window.
        seed: Random seed of the order of sentences.
        steps_per_call: K.

    Examples:
        >>> docs = Documents(np.arange(4, 14, dtype=np.int32), np.array([0, 3, 10]), np.zeros(2, np.int32))
        >>> stream = ContiguousStream(docs, batch_size=2, unroll=3, seed=0)
        >>> stream.steps_per_epoch, [chunk.batches.words.shape for chunk in stream.chunks(0, 2)]
        (2, [(1, 2, 2, 4), (1, 2, 2, 4)])
    """

    def __init__(
        self, documents: Documents, batch_size: int, unroll: int, seed: int, steps_per_call: int = 1
    ):
        self.documents, self.batch_size, self.unroll = documents, batch_size, unroll
        self.seed, self.steps_per_call, self.group_scale = seed, steps_per_call, 1
        total = int(documents.offsets[-1]) + 2 * len(documents)
        self.tokens_per_row = total // batch_size
        self.steps_per_epoch = (self.tokens_per_row - 1) // unroll
        if self.steps_per_epoch < 1:
            raise InputError(f"{total} tokens are too few; lower `batch_size` or `unroll`, or give more text")
        self.tokens_per_epoch = self.steps_per_epoch * unroll * batch_size
        self._cached_order = -1, np.array([], int), np.array([], int)  # epoch, sentences, their starts

    def chunks(self, first: int, last: int, rows: slice = ALL) -> Iterator[StepChunk]:
        """See `Stream.chunks`."""
        k = np.arange(self.steps_per_call)
        while first < last:
            epoch, i = divmod(first, self.steps_per_epoch)
            count = min(self.steps_per_call, self.steps_per_epoch - i, last - first)
            yield StepChunk(self._read(epoch, i + np.where(k < count, k, 0), rows), count)
            first += count

    def window(self, step: int, rows: slice = ALL) -> Window:
        """Return the window of a step, or some rows of it."""
        return self._read(*divmod(step, self.steps_per_epoch), rows)

    def document_indices(self, step: int) -> np.ndarray:
        """See `Stream.document_indices`."""
        return np.unique(self._locate(*divmod(step, self.steps_per_epoch), ALL)[0])

    def shapes(self) -> list[Any]:
        """See `Stream.shapes`; all windows have one shape, except for their `UniqueWords`."""
        return []

    def _read(self, epoch: int, steps: Any, rows: slice) -> Window:
        """Return the windows of one or several steps of an epoch, with leaves ``[..., D, B, U]``."""
        document, position = self._locate(epoch, steps, rows)
        start = np.asarray(self.documents.offsets[document])
        n = np.asarray(self.documents.offsets[document + 1]) - start
        inner = (position > 0) & (position <= n)
        directions = []
        for index, begin, end in ((position - 1, BOS, EOS), (n - position, EOS, BOS)):
            words = np.where(position == 0, np.int32(begin), np.int32(end))
            words[inner] = self.documents.ids[(start + index)[inner]]
            directions.append(words)
        ids = np.stack(directions, axis=-3)
        weight = np.stack([position <= n] * DIRECTIONS, axis=-3)[..., :-1].astype(np.float32)
        characters = self.documents.characters(ids[..., :-1], 3, self.group_scale if rows == ALL else 0)
        return Window(self.documents.known_words(ids), weight, *characters)

    def _locate(self, epoch: int, steps: Any, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Return every token's document and its position in the document, each ``[..., B, U + 1]``."""
        if self._cached_order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            lengths = self.documents.lengths[order] + 2
            self._cached_order = epoch, order, np.cumsum(lengths) - lengths
        _, order, starts = self._cached_order
        row_starts = np.arange(self.batch_size)[rows, None] * self.tokens_per_row
        positions = row_starts + np.asarray(steps)[..., None, None] * self.unroll + np.arange(self.unroll + 1)
        sentence = np.searchsorted(starts, positions, "right") - 1
        return order[sentence], positions - starts[sentence]

"""Batches of static shape from documents of any length, in an order that seed and step give.

Nouns: *documents* are token ids laid end to end; a *bucket* holds documents padded to one
length, its *bound*; a *dispatch* is up to K batches of one bucket, run by one call of the
device; a *stream* turns documents into dispatches.
Axes: B batch, T time, K steps a dispatch.

Where to cut documents into buckets by length.

Running text as windows whose LSTM state is carried from batch to batch, as bilm-tf trains.

Nouns: a *stream* is all sentences of an epoch end to end, in an order drawn anew; each batch
row reads a stretch of it of its own, and a *window* is the next U + 1 tokens of every row.
Axes: B batch, U steps a window, D direction, C characters, K steps a dispatch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from flax import struct

from elmo_jax.data.characters import UniqueWords, unique_words
from elmo_jax.data.text import BOS, EOS, PAD, UNK

ROUND = 4  # bounds are multiples of it, the longest too
_PRICE = 20_000  # steps an epoch that another bucket must save to be worth its compilation


def filled_batches(documents: np.ndarray, batch_size: int) -> np.ndarray:
    """How many batches the documents up to each bucket fill, if what is left joins the next bucket.

    Args:
        documents: rising, how many there are up to each bucket.
        batch_size: rows a batch.

    Returns:
        Batches up to each bucket; with the last document one more, if it is to be part-filled.

    Example:
        >>> filled_batches(np.array([3, 6, 9, 9]), batch_size=4)
        array([0, 1, 3, 3])
    """
    return np.where(documents < documents[-1], documents, documents[-1] + batch_size - 1) // batch_size


def bucket_bounds(lengths: np.ndarray, batch_size: int = 1, most: int = 12) -> tuple[int, ...]:
    """Where to cut documents into buckets so that steps are fewest, and compilations few.

    Steps are those of all rows of an epoch, as `filled_batches` has them. Each bucket is a shape to
    compile, which counts as much as 20,000 steps. The bounds are the best there are of their
    number, by dynamic programming.

    Args:
        lengths: ``[N]`` steps a document, at least one.
        batch_size: rows a batch.
        most: how many bounds at the most.

    Returns:
        Bounds, rising multiples of 4; the last holds the longest document.

    Example:
        >>> bucket_bounds(np.repeat([3, 4, 20], [9000, 9000, 9000]))
        (4, 20)
    """
    counts = np.bincount(-(-lengths // ROUND))
    bound = np.flatnonzero(counts)  # candidates, in units of ROUND
    below = np.concatenate([[0], np.cumsum(counts[bound])])  # documents up to each
    # span[j, i]: steps of one bucket from candidate i up to j; costs[k][j]: fewest steps of the
    # documents up to candidate j in k + 1 buckets, the last of which begins at cuts[k][j].
    filled = filled_batches(below, batch_size)
    span = (filled[1:, None] - filled[None, :-1]) * (batch_size * bound[:, None] * float(ROUND))
    span = np.where(np.tri(len(bound), dtype=bool), span, np.inf)
    costs, cuts = [span[:, 0]], [np.zeros(len(bound), int)]
    for _ in range(1, min(most, len(bound))):
        total = np.concatenate([[np.inf], costs[-1][:-1]])[None] + span
        costs.append(total.min(1))
        cuts.append(total.argmin(1))
    buckets = int(np.argmin([cost[-1] + _PRICE * k for k, cost in enumerate(costs)]))
    chosen, j = [], len(bound) - 1
    for k in range(buckets, -1, -1):
        chosen.append(int(bound[j]) * ROUND)
        j = int(cuts[k][j]) - 1
    return tuple(reversed(chosen))


DIRECTIONS = 2  # forward, then backward
ALL = slice(None)  # rows of a batch
_LOOKED = 512  # steps, for the shapes that spelled words have
_GROUP = 8  # batches of one shape in a row, so that a dispatch can hold several


@struct.dataclass
class Batch:
    """Documents side by side, ``<S>`` before and ``</S>`` behind each; a JAX pytree.

    Attributes:
        words: ``[B, T]`` int32 ids, 0 beyond the length.
        lengths: ``[B]`` int32, real tokens a row with ``<S>`` and ``</S>``; 0 on filler rows.
        labels: ``[B]`` int32 classes, or None.
        weight: ``[B]`` float32, 1, and 0 on the filler rows that keep shapes static.
        chars: ``[B, T, C]`` int32 character ids, 0 beyond the length, or None.
        distinct: a `UniqueWords` of just these words, so that each is spelled once; or None.

    Example:
        >>> batch = Batch.of([[7, 8], [9]])
        >>> batch.words.tolist(), batch.lengths.tolist()
        ([[1, 7, 8, 2], [1, 9, 2, 0]], [4, 3])
    """

    words: Any  # of NumPy on the host, of JAX on the device
    lengths: Any
    labels: Any
    weight: Any
    chars: Any = None
    unique_words: Any = None
    ROWS: ClassVar[int] = 0  # the axis of B

    @classmethod
    def of(
        cls,
        sentences: Sequence[Sequence[int] | np.ndarray],
        labels: Sequence[int] | np.ndarray | None = None,
        shape: tuple[int, int] | None = None,
    ) -> "Batch":
        """A batch of these ids, padded to `shape` [B, T], or to the longest row if None."""
        rows, steps = shape or (len(sentences), 2 + max(map(len, sentences), default=0))
        words = np.full((rows, steps), PAD, np.int32)
        lengths, classes = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
        weight = np.zeros(rows, np.float32)
        for i, ids in enumerate(sentences):
            n = len(ids) + 2
            words[i, 0], words[i, 1 : n - 1], words[i, n - 1] = BOS, ids, EOS
            lengths[i], weight[i] = n, 1
        if labels is not None:
            classes[: len(sentences)] = labels
        return cls(words, lengths, None if labels is None else classes, weight)


@dataclass(frozen=True)
class Documents:
    """Token ids laid end to end, and a class for each document.

    Attributes:
        ids: ``[tokens]`` int32.
        offsets: ``[N + 1]`` int64; document n is ``ids[offsets[n]:offsets[n + 1]]``.
        labels: ``[N]`` int32 classes.
        spellings: for models that read characters, the character ids of every token id
            ``[types, C]``; else None. There may be more types than classes.
        classes: V. Token ids from here on are spelled, but as a class they are unknown.
        longest: what is longer counts as cut to this many tokens; None cuts nothing.
    """

    ids: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    spellings: np.ndarray | None = None
    classes: int | None = None
    longest: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def lengths(self) -> np.ndarray:
        """``[N]`` int64, tokens a document without ``<S>`` and ``</S>``."""
        lengths = np.diff(self.offsets)
        return lengths if self.longest is None else np.minimum(lengths, self.longest)

    def take(self, rows: np.ndarray) -> "Documents":
        """These documents, in this order."""
        lengths = self.lengths[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        index = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][rows] - offsets[:-1], lengths)
        return replace(self, ids=self.ids[index], offsets=offsets, labels=self.labels[rows])

    def share(self, share: float, seed: int) -> "Documents":
        """A seeded draw of that share of every class, at least one document of each, in their order."""
        rng = np.random.default_rng(seed)
        of_class = [rng.permutation(np.flatnonzero(self.labels == c)) for c in np.unique(self.labels)]
        drawn = [rows[: max(1, round(share * len(rows)))] for rows in of_class]
        return self.take(np.sort(np.concatenate(drawn)))

    def batch(self, rows: np.ndarray, steps: int, once: bool = False) -> Batch:
        """Documents as a batch of leaves ``[..., B, T]``.

        Args:
            rows: their numbers ``[..., B]``, -1 for filler rows.
            steps: T.
            once: whether to find the words that differ, for a step of all B rows to spell once.
        """
        real = rows >= 0
        lengths = np.where(real, self.lengths[rows] + 2, 0).astype(np.int32)  # [..., B]
        t, n = np.arange(steps), lengths[..., None]
        inner = (t > 0) & (t < n - 1)  # [..., B, T]
        ids = np.full(inner.shape, PAD, np.int32)
        ids[inner] = self.ids[(self.offsets[rows][..., None] + t - 1)[inner]]
        ids[..., 0] = np.where(real, BOS, PAD)
        ids[(t == n - 1) & (n > 0)] = EOS
        labels = np.where(real, self.labels[rows], 0).astype(np.int32)
        with_characters = self.spell(ids, 2 if once else None)
        return Batch(self.as_classes(ids), lengths, labels, real.astype(np.float32), *with_characters)

    def as_classes(self, ids: np.ndarray) -> np.ndarray:
        """Token ids as classes, int32."""
        return ids if self.classes is None else np.where(ids < self.classes, ids, UNK).astype(np.int32)

    def spell(self, ids: np.ndarray, axes: int | None) -> tuple[np.ndarray | None, UniqueWords | None]:
        """Token ids as characters ``[..., C]`` or None; and which words of a step of so many axes differ."""
        if self.spellings is None:
            return None, None
        return self.spellings[ids], None if axes is None else unique_words(ids, axes)


class StepChunk(NamedTuple):
    """Up to K batches of one shape: leaves ``[K, ...]``, of which the first `count` are to run."""

    batches: Any  # a Batch, or what else a task reads
    count: int


class Stream(Protocol):
    """What the loop needs of a stream."""

    batch_size: int
    steps_per_epoch: int

    def chunks(self, first: int, last: int, part: slice = ALL) -> Iterator[StepChunk]:
        """The batches of steps `first` up to but not including `last`, counted from the first epoch.

        Of their rows those of `part` alone, without reading others.
        """
        ...

    def rows(self, step: int) -> np.ndarray:
        """The documents of a step, to name them when it fails."""
        ...

    def shapes(self) -> list[Any]:
        """A dispatch's batches for every shape that is known to come, to compile for it ahead.

        None where there is no choice of them. Steps of spelled words vary in how many differ, and
        so in shape: not all are known.
        """
        ...


class BatchStream:
    """Documents as batches; the batch of a step is a function of (seed, step) alone.

    An epoch holds every document once. Documents of like length share a batch, but for those
    that do not fill one, which join the next longer; batches of one shape follow each other by
    up to eight, and the order of everything else is drawn anew each epoch.

    Args:
        documents: at least one.
        batch_size: B.
        seed: of the order; None keeps the documents by length, for evaluation.
        bounds: of the buckets; by `bucket_bounds` if None. Documents longer than the last
            get one more bucket.
        steps_per_call: K, of which no more than eight are taken; it does not change the order.

    Example:
        >>> docs = Documents(np.arange(4, 14, dtype=np.int32), np.array([0, 3, 10]), np.array([0, 1]))
        >>> stream = BatchStream(docs, batch_size=2)
        >>> stream.steps_per_epoch, [d.batches.words.shape for d in stream.chunks(0, 1)]
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
        self.bounds, self.steps_per_call = bounds, min(steps_per_call, _GROUP)
        bucket = np.searchsorted(np.array(bounds), steps)
        by_length = np.argsort(steps, kind="stable")
        self._buckets = [by_length[bucket[by_length] == i] for i in range(len(bounds))]
        filled = filled_batches(np.cumsum([len(rows) for rows in self._buckets]), batch_size)
        self._batches = np.diff(filled, prepend=0).tolist()  # of each bucket
        self.steps_per_epoch = sum(self._batches)
        self.tokens_per_epoch = int(documents.lengths.sum())

    @property
    def padding(self) -> float:
        """The share of steps, filler rows among them, that hold no token."""
        pairs = zip(self._batches, self.bounds, strict=True)
        steps = sum(batches * self.batch_size * bound for batches, bound in pairs)
        return 1 - (self.tokens_per_epoch + 2 * len(self.documents)) / steps

    def shapes(self) -> list[Batch]:
        """See `Stream.shapes`."""
        if self.documents.spellings is not None:
            looked = self.chunks(0, min(_LOOKED, self.steps_per_epoch))
            shaped = {(b.words.shape, b.unique_words and b.unique_words.first.shape): b for b, _ in looked}
            return list(shaped.values())
        buckets = zip(self.bounds, self._buckets, self._batches, strict=True)
        return [self._stack([rows[: self.batch_size]], bound, ALL).batches for bound, rows, n in buckets if n]

    def order(self) -> np.ndarray:
        """The documents' numbers ``[N]`` in the order of the first epoch's rows, fillers left out."""
        return np.concatenate([rows for _, batches in self._epoch(0) for rows in batches])

    def _epoch(self, epoch: int) -> list[tuple[int, list[np.ndarray]]]:
        """An epoch's groups in order, each a bound and its batches' documents."""
        rng = None if self.seed is None else np.random.default_rng([self.seed, epoch])
        groups, left = [], np.array([], int)
        for bound, rows, count in zip(self.bounds, self._buckets, self._batches, strict=True):
            rows = np.concatenate([left, rows])
            rows = rows if rng is None else rng.permutation(rows)
            batches = [rows[i * self.batch_size :][: self.batch_size] for i in range(count)]
            left = rows[count * self.batch_size :]
            if rng is not None:  # the part-filled batch must not always be the bucket's last
                batches = [batches[i] for i in rng.permutation(len(batches))]
            groups += [(bound, batches[i : i + _GROUP]) for i in range(0, len(batches), _GROUP)]
        return groups if rng is None else [groups[i] for i in rng.permutation(len(groups))]

    def rows(self, step: int) -> np.ndarray:
        """``[N]`` which documents the batch of a step holds, counted from the first epoch."""
        epoch, place = divmod(step, self.steps_per_epoch)
        return [rows for _, batches in self._epoch(epoch) for rows in batches][place]

    def chunks(self, first: int, last: int, part: slice = ALL) -> Iterator[StepChunk]:
        """See `Stream.chunks`."""
        step = first
        while step < last:
            epoch, start = divmod(step, self.steps_per_epoch)
            position = epoch * self.steps_per_epoch
            for bound, batches in self._epoch(epoch):
                skip, position = step - position, position + len(batches)
                if position <= step:
                    continue
                enabled = batches[skip : skip + last - step]
                for i in range(0, len(enabled), self.steps_per_call):
                    yield self._stack(enabled[i : i + self.steps_per_call], bound, part)
                step += len(enabled)
                if step >= last:
                    return

    def _stack(self, batches: list[np.ndarray], bound: int, part: slice) -> StepChunk:
        rows = np.full((self.steps_per_call, self.batch_size), -1)  # [K, B]
        for k, batch in enumerate(batches):
            rows[k, : len(batch)] = batch
        rows[len(batches) :] = rows[0]  # never run, see Dispatch
        return StepChunk(self.documents.batch(rows[:, part], bound, once=part == ALL), len(batches))


@struct.dataclass
class Window:
    """The next tokens of every row, in reading order; a JAX pytree.

    Attributes:
        words: ``[D, B, U + 1]`` int32 ids. Forward a sentence is ``<S> w1 ... wn </S>``,
            backward ``</S> wn ... w1 <S>``, both at the same places.
        weight: ``[D, B, U]`` float32: 1 where the next token is to be predicted, 0 from a
            sentence's last mark to the next one's first.
        chars: ``[D, B, U, C]`` int32 of all but the last token, or None.
        distinct: a `UniqueWords` of just these words, so that each is spelled once; or None.
    """

    words: Any
    weight: Any
    chars: Any = None
    unique_words: Any = None
    ROWS: ClassVar[int] = 1  # the axis of B


class ContiguousStream:
    """Documents as windows; the window of a step is a function of (seed, step) alone.

    What is left of an epoch's stream after the last whole window is not read.

    Args:
        documents: at least B (U + 1) tokens, marks among them.
        batch_size: B.
        unroll: U.
        seed: of the order of sentences.
        steps_per_call: K.

    Example:
        >>> docs = Documents(np.arange(4, 14, dtype=np.int32), np.array([0, 3, 10]), np.zeros(2, np.int32))
        >>> stream = ContiguousStream(docs, batch_size=2, unroll=3, seed=0)
        >>> stream.steps_per_epoch, [d.batches.words.shape for d in stream.chunks(0, 2)]
        (2, [(1, 2, 2, 4), (1, 2, 2, 4)])
    """

    def __init__(
        self, documents: Documents, batch_size: int, unroll: int, seed: int, steps_per_call: int = 1
    ):
        self.documents, self.batch_size, self.unroll = documents, batch_size, unroll
        self.seed, self.steps_per_call = seed, steps_per_call
        total = int(documents.offsets[-1]) + 2 * len(documents)
        self.stretch = total // batch_size  # tokens a row
        self.steps_per_epoch = (self.stretch - 1) // unroll
        if self.steps_per_epoch < 1:
            raise ValueError(f"{total} tokens are too few for {batch_size} rows of {unroll + 1}")
        self.tokens_per_epoch = self.steps_per_epoch * unroll * batch_size
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None

    def chunks(self, first: int, last: int, part: slice = ALL) -> Iterator[StepChunk]:
        """See `elmo_jax.data.batching.Stream.chunks`."""
        step = first
        while step < last:
            left = self.steps_per_epoch - step % self.steps_per_epoch
            count = min(self.steps_per_call, left, last - step)
            made = [self._ids(step + i, part) for i in range(count)]
            made += [made[0]] * (self.steps_per_call - count)  # never run, see Dispatch
            yield StepChunk(self._read(part, *map(np.stack, zip(*made, strict=True))), count)
            step += count

    def shapes(self) -> list[Any]:
        """See `Stream.shapes`; windows have one, but for how many words differ."""
        return []

    def rows(self, step: int) -> np.ndarray:
        """``[N]`` the documents that a step reads of, counted from the first epoch."""
        return np.unique(self._places(step, ALL)[0])

    def _places(self, step: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """The document and the place in it of every token of a step's window, each ``[B, U + 1]``."""
        epoch, i = divmod(step, self.steps_per_epoch)
        order, begins = self._order(epoch)
        rows = np.arange(self.batch_size)[part] * self.stretch + i * self.unroll
        place = np.arange(self.unroll + 1)[None] + rows[:, None]  # in the stream
        sentence = np.searchsorted(begins, place, "right") - 1
        return order[sentence], place - begins[sentence]

    def window(self, step: int, part: slice = ALL) -> Window:
        """The window of a step, or these rows of it."""
        return self._read(part, *self._ids(step, part))

    def _read(self, part: slice, ids: np.ndarray, weight: np.ndarray) -> Window:
        """Windows of token ids ``[..., D, B, U + 1]``, all rows of a step or this part."""
        with_characters = self.documents.spell(ids[..., :-1], 3 if part == ALL else None)
        return Window(self.documents.as_classes(ids), weight, *with_characters)

    def _ids(self, step: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
        """Token ids ``[D, B, U + 1]`` and weights of a step's window."""
        document, within = self._places(step, part)
        begin = np.asarray(self.documents.offsets[document])
        n = np.asarray(self.documents.offsets[document + 1]) - begin
        inner = (within > 0) & (within <= n)
        ids = np.empty((DIRECTIONS, *within.shape), np.int32)
        for d, (at, marks) in enumerate(((within - 1, (BOS, EOS)), (n - within, (EOS, BOS)))):
            ids[d] = np.where(within == 0, marks[0], marks[1])
            ids[d][inner] = self.documents.ids[(begin + at)[inner]]
        weight = (within <= n)[:, :-1].astype(np.float32)  # the last mark predicts nothing
        return ids, np.repeat(weight[None], DIRECTIONS, axis=0)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's sentences in order, and where in the stream each begins."""
        if self._drawn is None or self._drawn[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.documents))
            lengths = self.documents.lengths[order] + 2
            self._drawn = epoch, order, np.cumsum(lengths) - lengths
        return self._drawn[1:]

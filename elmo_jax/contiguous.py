"""Running text as windows whose LSTM state is carried from batch to batch, as bilm-tf trains.

Nouns: a *stream* is all sentences of an epoch end to end, in an order drawn anew; each batch
row reads a stretch of it of its own, and a *window* is the next U + 1 tokens of every row.
Axes: B batch, U steps a window, D direction, C characters, K steps a dispatch.
"""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
from flax import struct

from elmo_jax.data import ALL, DIRECTIONS, Dispatch, Documents
from elmo_jax.text import BOS, EOS


@struct.dataclass
class Window:
    """The next tokens of every row, in reading order; a JAX pytree.

    Attributes:
        words: ``[D, B, U + 1]`` int32 ids. Forward a sentence is ``<S> w1 ... wn </S>``,
            backward ``</S> wn ... w1 <S>``, both at the same places.
        weight: ``[D, B, U]`` float32: 1 where the next token is to be predicted, 0 from a
            sentence's last mark to the next one's first.
        chars: ``[D, B, U, C]`` int32 of all but the last token, or None.
        distinct: a `Distinct` of just these words, so that each is spelled once; or None.
    """

    words: Any
    weight: Any
    chars: Any = None
    distinct: Any = None
    ROWS: ClassVar[int] = 1  # the axis of B


class ContiguousStream:
    """Documents as windows; the window of a step is a function of (seed, step) alone.

    What is left of an epoch's stream after the last whole window is not read.

    Args:
        documents: at least B (U + 1) tokens, marks among them.
        batch_size: B.
        unroll: U.
        seed: of the order of sentences.
        steps_per_dispatch: K.

    Example:
        >>> docs = Documents(np.arange(4, 14, dtype=np.int32), np.array([0, 3, 10]), np.zeros(2, np.int32))
        >>> stream = ContiguousStream(docs, batch_size=2, unroll=3, seed=0)
        >>> stream.steps_per_epoch, [d.batches.words.shape for d in stream.dispatches(0, 2)]
        (2, [(1, 2, 2, 4), (1, 2, 2, 4)])
    """

    def __init__(
        self, documents: Documents, batch_size: int, unroll: int, seed: int, steps_per_dispatch: int = 1
    ):
        self.documents, self.batch_size, self.unroll = documents, batch_size, unroll
        self.seed, self.steps_per_dispatch = seed, steps_per_dispatch
        total = int(documents.offsets[-1]) + 2 * len(documents)
        self.stretch = total // batch_size  # tokens a row
        self.steps_per_epoch = (self.stretch - 1) // unroll
        if self.steps_per_epoch < 1:
            raise ValueError(f"{total} tokens are too few for {batch_size} rows of {unroll + 1}")
        self.tokens_per_epoch = self.steps_per_epoch * unroll * batch_size
        self._drawn: tuple[int, np.ndarray, np.ndarray] | None = None

    def dispatches(self, first: int, last: int, part: slice = ALL) -> Iterator[Dispatch]:
        """See `elmo_jax.data.Stream.dispatches`."""
        step = first
        while step < last:
            left = self.steps_per_epoch - step % self.steps_per_epoch
            count = min(self.steps_per_dispatch, left, last - step)
            made = [self._ids(step + i, part) for i in range(count)]
            made += [made[0]] * (self.steps_per_dispatch - count)  # never run, see Dispatch
            yield Dispatch(self._read(part, *map(np.stack, zip(*made, strict=True))), count)
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
        spelled = self.documents.spell(ids[..., :-1], 3 if part == ALL else None)
        return Window(self.documents.as_classes(ids), weight, *spelled)

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

"""Sentences through a trained biLM: any number, any length, a window of steps at a time.

Nouns: a *window* is the next W steps of reading, in each direction from its own end; a
*word table* keeps the vectors of words already met on the device.
Axes: B batch, T time, W steps a window, D direction, L layers, E embedding, P projection.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from elmo_jax.data.batching import DIRECTIONS
from elmo_jax.data.characters import character_ids
from elmo_jax.data.text import BOS, EOS, SPECIAL, Vocabulary
from elmo_jax.models.bilm import BiLM, zero_state
from elmo_jax.ops.lstm import State

# Shapes are rounded up to these, so that few are compiled and little is padding.
_WINDOWS = (16, 24, 32, 48, 64, 96, 128)
_ROWS = (1, 4, 16, 64)
BATCH_TOKENS = 2048  # sentences times steps at once, about
_SPELLED = 256  # words through the character CNN at once
_WORDS = 1 << 15  # most in a table


class WordTable:
    """Token vectors on the device, and the row of each token.

    By word the table is the model's own. From characters it is filled as words are met; a
    word's vector never depends on when that was. It is emptied when full, so memory is
    bounded however many words there are.

    Args:
        model: the language model.
        params: its parameters.
        vocabulary: its numbering of tokens, if it reads words.
    """

    def __init__(self, model: BiLM, params: Any, vocabulary: Vocabulary | None):
        self._params, self._vocabulary, self._capacity = params, vocabulary, _WORDS
        self._rows: dict[str, int] = {}
        self._width = model.config.embedding
        # As much padding as the widest filter sees is kept; see `character_ids`.
        self._multiple = max(8, *(width for width, _ in model.config.characters.filters))
        by_word = model.config.input == "words"
        self.table = params["embedder"]["table"] if by_word else jnp.zeros((0, self._width), jnp.float32)
        self._by_word = by_word

        def spell(params: Any, ids: Array) -> Array:
            vectors: Any = model.apply({"params": params}, ids, method="token_vectors")
            return vectors.astype(jnp.float32)

        def put(table: Array, vectors: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice(table, vectors, (start, jnp.zeros_like(start)))

        self._spell, self._put = jax.jit(spell), jax.jit(put, donate_argnums=0)

    def forget(self) -> None:
        """Know no word, as at the beginning; of a model of words that is nothing."""
        self._rows = {}

    def rows(self, sentences: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Rows of `table` for every token, ``<S>`` before and ``</S>`` behind: int32 ``[tokens + 2]``."""
        if self._by_word:
            assert self._vocabulary is not None
            return [np.r_[BOS, self._vocabulary.ids(s), EOS].astype(np.int32) for s in sentences]
        begin, end = SPECIAL[BOS], SPECIAL[EOS]
        self._learn(dict.fromkeys((begin, end, *(word for s in sentences for word in s))))
        known = self._rows
        return [
            np.fromiter((known[word] for word in (begin, *s, end)), np.int32, len(s) + 2) for s in sentences
        ]

    def _learn(self, words: dict[str, None]) -> None:
        new = [word for word in words if word not in self._rows]
        if len(self._rows) + len(new) > self._capacity:
            self.forget()
            new = list(words)
        new.sort(key=lambda word: len(word.encode("utf-8", "ignore")))  # words of a length share a shape
        self._grow(len(self._rows) + len(new))
        for i in range(0, len(new), _SPELLED):
            part = new[i : i + _SPELLED]
            # The last part is filled up with its last word; what it writes is written over.
            ids = character_ids(part + part[-1:] * (_SPELLED - len(part)), multiple=self._multiple)
            self.table = self._put(self.table, self._spell(self._params, ids), np.int32(len(self._rows)))
            self._rows.update({word: len(self._rows) + k for k, word in enumerate(part)})

    def _grow(self, words: int) -> None:
        need = words + _SPELLED
        if need > len(self.table):
            size = 1 << (need - 1).bit_length()
            self.table = jnp.zeros((size, self._width), jnp.float32).at[: len(self.table)].set(self.table)


class Reader:
    """Runs batches of sentences through a language model, a window at a time.

    Args:
        model: the language model.
        params: its parameters.
        vocabulary: its numbering of tokens, if it reads words.

    Attributes:
        window: most steps at once; longer sentences take several windows, each beginning
            with the state the one before ended with, which changes nothing.
    """

    def __init__(self, model: BiLM, params: Any, vocabulary: Vocabulary | None):
        self.config, self.words = model.config, WordTable(model, params, vocabulary)
        self.window = _WINDOWS[-1]
        self._params: Any = params
        self._vocabulary: Any = vocabulary

        def nll(params: Any, layers: Array, targets: Array) -> Array:
            return model.apply({"params": params}, layers[-1], targets, method="surprisal")  # type: ignore

        self._nll = jax.jit(nll)

        def run(params: Any, x: Array, lengths: Array, state: Any):
            x = x.astype(model.config.dtype)
            out: Any = model.apply({"params": params}, x, lengths, state, method="contextualize")
            return jnp.stack([h.astype(jnp.float32) for h in out[0]]), out[1]

        self._run = jax.jit(run, donate_argnums=3)
        self._take = jax.jit(
            lambda table, rows: jnp.take(table, rows, axis=0)
        )  # its shape changes, run's not

    def read(
        self,
        sentences: Sequence[Sequence[str]],
        out: Sequence[Any],
        state: tuple[State, ...] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> tuple[State, ...]:
        """Write the layers of every token of a batch of sentences.

        Args:
            sentences: tokens; B of them, at least one.
            out: for each sentence what takes ``out[:, tokens, features] = ...`` for float32
                ``[L, tokens, F]``: an array, or an HDF5 dataset.
            state: the first state, of at least B rows; zeros if None.
            batch_tokens: what `groups` was given.

        Returns:
            The state after each sentence, for as many rows as were given.
        """
        counts = [len(s) for s in sentences]
        last: Any = state
        for start, layers, after in self._windows(sentences, state, batch_tokens):
            _write(np.asarray(layers), start, counts, out)
            last = after
        return last

    def surprisal(self, sentences: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """-log p of every token with the full softmax; see `Elmo.surprisal`."""
        ids = [np.r_[BOS, self._vocabulary.ids(s), EOS].astype(np.int32) for s in sentences]
        out = [np.empty((DIRECTIONS, len(s) + 1), np.float32) for s in sentences]
        for start, layers, _ in self._windows(sentences, None, BATCH_TOKENS):
            _, _, rows, steps, _ = layers.shape
            targets = np.zeros((DIRECTIONS, rows, steps), np.int32)
            for b, row in enumerate(ids):
                for d in range(DIRECTIONS):
                    part = row[:: -1 if d else 1][start + 1 : start + 1 + steps]
                    targets[d, b, : len(part)] = part
            each = np.asarray(self._nll(self._params, layers, targets))
            for b, row in enumerate(out):
                last = min(start + steps, row.shape[1])
                if start < last:
                    row[0, start:last] = each[0, b, : last - start]
                    row[1, ::-1][start:last] = each[1, b, : last - start]
        return out

    def _windows(
        self, sentences: Sequence[Sequence[str]], state: tuple[State, ...] | None, batch_tokens: int
    ) -> Iterator[tuple[int, Array, tuple[State, ...]]]:
        """Every window's first step, its layers ``[L, D, B, W, P]``, and the state after it."""
        rows = len(state[0].c[0]) if state is not None else self.rows_for(sentences, batch_tokens)
        lengths = np.zeros(rows, np.int32)
        lengths[: len(sentences)] = [len(s) + 2 for s in sentences]
        # A copy, because the first window takes what it is given: a stopped call leaves the state whole.
        carried: Any = zero_state(self.config, rows) if state is None else jax.tree.map(jnp.copy, state)
        longest = int(lengths.max(initial=2))
        steps = self._steps(longest)
        for start in range(0, longest, steps):
            indices = self._indices(sentences, start, steps, rows)
            left = np.clip(lengths - start, 0, steps).astype(np.int32)
            x = self._take(self.words.table, indices)
            layers, carried = self._run(self._params, x, left, carried)
            yield start, layers, carried

    def groups(self, lengths: Sequence[int], batch_tokens: int = BATCH_TOKENS) -> Iterator[list[int]]:
        """Sentences to run together: of like length, about `batch_tokens` steps at once."""
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        start = 0
        while start < len(order):
            rows = self._most_rows(lengths[order[start]] + 2, batch_tokens)
            yield order[start : start + rows]
            start += rows

    def rows_for(self, sentences: Sequence[Sequence[str]], batch_tokens: int = BATCH_TOKENS) -> int:
        """Rows of the batch these sentences make, filler among them."""
        most = self._most_rows(max(map(len, sentences)) + 2, batch_tokens)
        return len(sentences) if len(sentences) >= most else min(most, _round_up(len(sentences), _ROWS))

    def _most_rows(self, longest: int, batch_tokens: int) -> int:
        return max(1, batch_tokens // self._steps(longest))

    def _steps(self, longest: int) -> int:
        return min(self.window, _round_up(longest, _WINDOWS))

    def _indices(self, sentences: Sequence[Sequence[str]], start: int, steps: int, rows: int) -> np.ndarray:
        """Word-table rows ``[D, B, W]`` of one window of every sentence."""
        parts, where = [], []
        for b, sentence in enumerate(sentences):
            n = len(sentence)
            for d in range(DIRECTIONS):
                # Reading index r is token r - 1 forward and n - r backward; 0 and n + 1 are
                # the marks, which a part gets at both its ends, so it is cut one wider.
                low, high = max(start - 1, 0), min(start + steps - 1, n)
                if start >= n + 2:
                    continue
                part = sentence[low:high] if d == 0 else sentence[n - high : n - low][::-1]
                parts.append(part)
                where.append((b, d, low))
        index = np.zeros((DIRECTIONS, rows, steps), np.int32)
        for (b, d, low), row in zip(where, self.words.rows(parts), strict=True):
            if d == 1:  # it begins with the end
                row = np.r_[row[-1], row[1:-1], row[0]]
            first = start - low  # 0 for the first window, which begins with a mark; else 1
            cut = row[first : first + steps]
            index[d, b, : len(cut)] = cut
        return index


def _write(layers: np.ndarray, start: int, counts: Sequence[int], out: Sequence[Any]) -> None:
    """Hand a window's ``[L, D, B, W, P]`` to the sentences, each half at its own place."""
    _, _, _, steps, width = layers.shape
    for b, (n, array) in enumerate(zip(counts, out, strict=True)):
        low, high = max(start, 1), min(start + steps, n + 1)  # reading indices of real tokens
        if low < high:
            part = layers[:, :, b, low - start : high - start]
            array[:, low - 1 : high - 1, :width] = part[:, 0]
            array[:, n + 1 - high : n + 1 - low, width:] = part[:, 1, ::-1]


def _round_up(n: int, sizes: Sequence[int]) -> int:
    """The least of the sizes that holds n; beyond the last, its least multiple."""
    return next((size for size in sizes if size >= n), -(-n // sizes[-1]) * sizes[-1])

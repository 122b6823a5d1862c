"""The bidirectional language model: token ids to layer states, and its loss.

Two LSTM stacks that share the token vectors and the softmax read each document, one from
its start and one from its end. In reading order both predict the next token, so they are
one stack with a direction axis; only the layer states are turned back.
Axes: B batch, T time, D direction, L layers (the token vectors are layer 0), P projection,
F = 2P features, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from elmo_jax.config import BiLMConfig
from elmo_jax.data.batching import DIRECTIONS, Batch, Window
from elmo_jax.data.characters import UniqueWords
from elmo_jax.models.embedders import CharCNN, WordEmbedder
from elmo_jax.models.lstm import LSTM, Kernel, join_directions, stack_directions, token_mask
from elmo_jax.ops.lstm import Clips, State
from elmo_jax.ops.softmax import Negatives, full_nll, sampled_nll
from elmo_jax.parallel import sum_over_shards


def lstm_layer(config: BiLMConfig, kernel: Kernel) -> LSTM:
    """One of the model's LSTM layers, all of which are alike."""
    c = config
    projection = c.embedding if c.projected else None
    clips = Clips(c.cell_clip, c.projection_clip if projection else None)
    return LSTM(c.cells, projection, clips, c.dtype, kernel)


class BiLM(nn.Module):
    """ELMo's language model (Peters et al. 2018).

    Attributes:
        config: its sizes.
        vocabulary: V, padding and special tokens included; 0 leaves the softmax out, as
            the official format does.
        kernel: of the LSTM layers; no part of a model that is saved.

    Example:
        >>> model = BiLM(BiLMConfig(embedding=4, cells=4), vocabulary=9)
        >>> batch = Batch.of([[5, 6, 7], [8]])
        >>> (layers, state), _ = model.init_with_output(jax.random.key(0), batch)
        >>> layers.shape  # L, B, T, F
        (3, 2, 5, 8)
    """

    config: BiLMConfig
    vocabulary: int
    kernel: Kernel = "auto"

    def setup(self):
        c = self.config
        by_word = c.input == "words"
        if by_word:
            self.embedder = WordEmbedder(self.vocabulary, c.embedding, c.dtype)
        else:
            self.embedder = CharCNN(c.characters, c.embedding, c.dtype)
        self.lstm = [lstm_layer(c, self.kernel) for _ in range(c.layers)]
        self.drop = nn.Dropout(c.dropout)
        self.tied = by_word and c.tie
        if self.vocabulary and not self.tied:
            scale = nn.initializers.normal(c.embedding**-0.5)
            self.softmax_table = self.param("softmax_table", scale, (self.vocabulary, c.embedding))
        if self.vocabulary:
            self.softmax_bias = self.param("softmax_bias", nn.initializers.zeros, (self.vocabulary,))

    def __call__(
        self, batch: Batch, state: tuple[State, ...] | None = None, train: bool = False
    ) -> tuple[Array, tuple[State, ...]]:
        """The states of every layer, token by token.

        Args:
            batch: B documents of at most T tokens.
            state: of each layer, from an earlier call; zeros if None.
            train: whether to drop out (needs the rng "dropout").

        Returns:
            ``[L, B, T, F]`` float32, 0 on padding: layer 0 is the token vector beside
            itself, the others are the forward half beside the backward one. And the state
            of each layer after each row's last token.
        """
        outputs, state = self.contextualize(self.read(batch), batch.lengths, state, train)
        both = jnp.stack([h.astype(outputs[-1].dtype) for h in outputs])  # [L, D, B, T, P]
        states = jax.vmap(join_directions, in_axes=(0, None))(both, batch.lengths)
        mask = token_mask(batch.lengths, states.shape[2])[None, :, :, None]
        return jnp.where(mask, states.astype(jnp.float32), 0), state

    def token_vectors(self, tokens: Array) -> Array:
        """Word ids ``[...]`` or character ids ``[..., C]`` to token vectors ``[..., E]``."""
        return self.embedder(tokens)

    def read(self, batch: Batch, deferred: bool = False) -> Array:
        """Token vectors ``[D, B, T, E]``, as each direction reads them; see `WordEmbedder.deferred`."""
        if self.config.input == "words":
            vectors = self._embed(jnp.asarray(batch.words), deferred)
        else:
            vectors = self._spell(jnp.asarray(batch.chars), batch.unique_words)
        return stack_directions(vectors, jnp.asarray(batch.lengths))

    def _embed(self, words: Array, deferred: bool) -> Array:
        return self.embedder.deferred(words) if deferred else self.embedder(words)

    def _spell(self, chars: Array, unique_words: UniqueWords | None) -> Array:
        """Character ids ``[..., C]`` to token vectors ``[..., E]``, words known to differ spelled once."""
        if unique_words is None:
            return self.embedder(chars)
        if unique_words.inverse.shape != chars.shape[:-1]:
            raise ValueError("a batch's `unique_words` is of other words; put None in its place")
        # A group at a time, so that no bit depends on how many groups there are; see `characters.GROUP_SIZE`.
        spell = nn.scan(
            lambda embedder, carry, words: (carry, embedder(words)),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        vectors = spell(self.embedder, (), chars.reshape(-1, chars.shape[-1])[unique_words.first])[1]
        vectors = vectors.reshape(-1, vectors.shape[-1])
        # The gradients of a frequent word's places are many: no sum for bfloat16.
        sums = np.promote_types(vectors.dtype, np.float32)
        return vectors.astype(sums)[unique_words.inverse].astype(vectors.dtype)

    def contextualize(
        self, x: Array, lengths: Array, state: tuple[State, ...] | None = None, train: bool = False
    ) -> tuple[list[Array], tuple[State, ...]]:
        """How the layers respond to token vectors, in reading order.

        Args:
            x: ``[D, B, T, E]``.
            lengths: ``[B]`` int32.
            state: of each layer; zeros if None.
            train: whether to drop out.

        Returns:
            The token vectors and then every LSTM layer's states, each ``[D, B, T, P]``; and
            the state of each layer after the last token.
        """
        outputs, after = [x], []
        for i, lstm in enumerate(self.lstm):
            x = self.drop(outputs[-1], deterministic=not train)
            h, last = lstm(x, lengths, None if state is None else state[i])
            # What goes round the recurrence is h before the addition.
            outputs.append(h + x.astype(h.dtype) if self.config.skip and i else h)
            after.append(last)
        return outputs, tuple(after)

    def nll(self, batch: Batch, train: bool = False, negatives: Negatives | None = None) -> dict[str, Array]:
        """Sums of -log p of every next token, by direction.

        Args:
            batch: B documents.
            train: whether to drop out (needs the rng "dropout").
            negatives: of the sampled softmax; None is the full one.

        Returns:
            Scalars: ``loss`` (both directions' sum, the one to differentiate),
            ``nll_forward``, ``nll_backward``, ``tokens`` predicted a direction, and
            ``words`` of the documents.
        """
        x = self.read(batch, deferred=negatives is None)
        outputs, _ = self.contextualize(x, batch.lengths, None, train)
        h = self.drop(outputs[-1], deterministic=not train)[:, :, :-1]  # [D, B, T - 1, P]
        targets = stack_directions(jnp.asarray(batch.words), jnp.asarray(batch.lengths))[:, :, 1:]
        weight = token_mask(batch.lengths - 1, h.shape[2])[None].astype(jnp.float32)
        weight = jnp.broadcast_to(weight, targets.shape)
        sums = self._sums(h, targets, weight, negatives)
        return sums | {"words": sums["tokens"] - jnp.sum(batch.weight)}

    def window_nll(
        self, window: Window, state: tuple[State, ...], negatives: Negatives | None = None
    ) -> dict[str, Any]:
        """`nll` of a window in training, from the state that the window before it left.

        Args:
            window: the next U steps of B rows.
            state: of each layer.
            negatives: as in `nll`.

        Returns:
            As `nll` but for ``words``, and the ``state`` after the window, through which no gradient flows.
        """
        if self.config.input == "words":
            x = self._embed(window.words[:, :, :-1], deferred=negatives is None)
        elif window.unique_words is not None:
            x = self._spell(jnp.asarray(window.chars), window.unique_words)
        else:  # rows first: laid end to end, the tokens of a device's rows must be neighbours
            x = self.token_vectors(window.chars.swapaxes(0, 1)).swapaxes(0, 1)
        _, rows, steps, _ = x.shape
        outputs, after = self.contextualize(x, jnp.full(rows, steps, jnp.int32), state, True)
        h = self.drop(outputs[-1], deterministic=False)
        sums = self._sums(h, window.words[:, :, 1:], window.weight, negatives)
        return sums | {"state": jax.lax.stop_gradient(after)}

    def surprisal(self, h: Array, targets: Array) -> Array:
        """-log p of each target with the full softmax, all of the leading shape of h ``[..., P]``."""
        rows = h.astype(self.config.dtype), targets, jnp.ones(targets.shape, jnp.float32)
        return _nll(rows, (*self._softmax(), None))[1]

    def _sums(self, h: Array, targets: Array, weight: Array, negatives: Negatives | None) -> dict[str, Array]:
        table, bias = self._softmax()
        whole = table, bias, negatives
        total, each = sum_over_shards(_nll, (h.astype(self.config.dtype), targets, weight), whole)
        forward, backward = jnp.sum(each * weight, axis=(1, 2))
        tokens = jnp.sum(weight[0])
        return {"loss": total, "nll_forward": forward, "nll_backward": backward, "tokens": tokens}

    def _softmax(self) -> tuple[Array, Array]:
        """Its table and bias."""
        return self.embedder.table if self.tied else self.softmax_table, self.softmax_bias


def _nll(rows: tuple[Array, Array, Array], whole: tuple[Array, Array, Negatives | None]):
    """The weighted sum, and every target's own value in the shape of the targets."""
    h, targets, weight = rows
    table, bias, negatives = whole
    flat = h.reshape(-1, h.shape[-1]), table, bias, targets.reshape(-1), weight.reshape(-1)
    total, each = full_nll(*flat) if negatives is None else sampled_nll(*flat, negatives)
    return total, each.reshape(targets.shape)


def zero_state(config: BiLMConfig, rows: int) -> tuple[State, ...]:
    """The state of every layer before anything is read: c ``[D, B, H]`` and h ``[D, B, P]``."""
    shapes = (DIRECTIONS, rows, config.cells), (DIRECTIONS, rows, config.embedding)
    return tuple(State(*(jnp.zeros(shape, jnp.float32) for shape in shapes)) for _ in range(config.layers))

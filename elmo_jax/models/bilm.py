"""Bidirectional LSTM language model: from token ids to the states of every layer, and its loss.

Two LSTM stacks share the token vectors and the softmax. One reads each document from its start, the
other from its end, and both predict the next token in reading order. They are one stack with a direction
axis D; only the returned layers are put back into text order. docs/concepts.md defines the axis letters.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from elmo_jax.config import BiLMConfig, Kernel
from elmo_jax.data.batching import DIRECTIONS, Batch, Window
from elmo_jax.data.characters import UniqueWords
from elmo_jax.models.embedders import CharCNN, WordEmbedder
from elmo_jax.models.lstm import LSTM, join_directions, stack_directions, token_mask
from elmo_jax.ops.lstm import Clips, State
from elmo_jax.ops.softmax import Negatives, full_nll, sampled_nll
from elmo_jax.parallel import sum_over_shards


def lstm_layer(config: BiLMConfig, kernel: Kernel) -> LSTM:
    """Return an LSTM layer of the model; all layers have the same sizes."""
    projection = config.embedding if config.projected else None
    clips = Clips(config.cell_clip, config.projection_clip if projection else None)
    return LSTM(config.cells, projection, clips, config.dtype, kernel)


def zero_state(config: BiLMConfig, batch_size: int) -> tuple[State, ...]:
    """Return the initial state of every layer: zeros, c ``[D, B, H]`` and h ``[D, B, P]``."""
    shapes = (DIRECTIONS, batch_size, config.cells), (DIRECTIONS, batch_size, config.embedding)
    return tuple(State(*(jnp.zeros(shape, jnp.float32) for shape in shapes)) for _ in range(config.layers))


class BiLM(nn.Module):
    """Bidirectional language model of ELMo (Peters et al. 2018).

    Attributes:
        config: Sizes of the model.
        vocabulary: V, special tokens included; 0 builds a model without softmax, as in the official format.
        kernel: Kernel of the LSTM layers; it is not saved with the model.

    Examples:
        >>> model = BiLM(BiLMConfig(embedding=4, cells=4), vocabulary=9)
        >>> batch = Batch.of([[5, 6, 7], [8]])
        >>> (layers, state), _ = model.init_with_output(jax.random.key(0), batch)
        >>> layers.shape  # [L, B, T, F]
        (3, 2, 5, 8)
    """

    config: BiLMConfig
    vocabulary: int
    kernel: Kernel = "auto"

    def setup(self):
        c = self.config
        if c.input == "words":
            self.embedder: Any = WordEmbedder(self.vocabulary, c.embedding, c.dtype)
        else:
            self.embedder = CharCNN(c.characters, c.embedding, c.dtype)
        self.lstm = [lstm_layer(c, self.kernel) for _ in range(c.layers)]
        self.drop = nn.Dropout(c.dropout)
        self.tied = c.input == "words" and c.tie
        if self.vocabulary and not self.tied:
            init = nn.initializers.normal(c.embedding**-0.5)
            self.softmax_table = self.param("softmax_table", init, (self.vocabulary, c.embedding))
        if self.vocabulary:
            self.softmax_bias = self.param("softmax_bias", nn.initializers.zeros, (self.vocabulary,))

    def __call__(
        self, batch: Batch, state: tuple[State, ...] | None = None, train: bool = False
    ) -> tuple[Array, tuple[State, ...]]:
        """Compute the states of every layer.

        Args:
            batch: B documents of at most T tokens.
            state: State of each layer after an earlier call; zeros if None.
            train: Apply dropout (needs the rng "dropout").

        Returns:
            Layers ``[L, B, T, F]`` float32, 0 on padding, and the state of each layer after the last token of
            each document. Layer 0 is the token vector, twice; the others are the forward state followed by
            the backward state.
        """
        outputs, state = self.contextualize(self.embed_directions(batch), batch.lengths, state, train)
        layers = jnp.stack([h.astype(outputs[-1].dtype) for h in outputs])  # [L, D, B, T, P]
        layers = jax.vmap(join_directions, in_axes=(0, None))(layers, batch.lengths)  # [L, B, T, F]
        mask = token_mask(batch.lengths, layers.shape[2])[None, :, :, None]
        return jnp.where(mask, layers.astype(jnp.float32), 0), state

    def token_vectors(self, tokens: Array) -> Array:
        """Return the vectors ``[..., E]`` of word ids ``[...]`` or of character ids ``[..., C]``."""
        return self.embedder(tokens)

    def embed_directions(self, batch: Batch, defer_gradient: bool = False) -> Array:
        """Return the token vectors ``[D, B, T, E]`` in the reading order of each direction.

        Args:
            batch: B documents.
            defer_gradient: See `WordEmbedder`; unused with characters.
        """
        if self.config.input == "words":
            vectors = self.embedder(jnp.asarray(batch.words), defer_gradient)
        else:
            vectors = self._embed_characters(jnp.asarray(batch.chars), batch.unique_words)
        return stack_directions(vectors, jnp.asarray(batch.lengths))

    def _embed_characters(self, chars: Array, unique_words: UniqueWords | None) -> Array:
        """Return the vectors ``[..., E]`` of character ids ``[..., C]``, each unique word embedded once."""
        if unique_words is None:
            return self.embedder(chars)
        first, inverse = unique_words
        if inverse.shape != chars.shape[:-1]:
            raise ValueError("unique_words does not match the words of the batch; set it to None")
        # Groups of equal size, one after the other: the number of groups cannot change the rounding.
        embed_groups = nn.scan(
            lambda embedder, carry, words: (carry, embedder(words)),
            variable_broadcast="params",
            split_rngs={"params": False},
        )
        vectors = embed_groups(self.embedder, (), chars.reshape(-1, chars.shape[-1])[first])[1]
        vectors = vectors.reshape(-1, vectors.shape[-1])
        # The gradient of a frequent word is a sum of many terms, which bfloat16 cannot accumulate.
        accumulator = np.promote_types(vectors.dtype, np.float32)
        return vectors.astype(accumulator)[inverse].astype(vectors.dtype)

    def contextualize(
        self, x: Array, lengths: Array, state: tuple[State, ...] | None = None, train: bool = False
    ) -> tuple[list[Array], tuple[State, ...]]:
        """Run the LSTM layers over token vectors, both in the reading order of each direction.

        Args:
            x: Token vectors ``[D, B, T, E]``.
            lengths: Tokens of each document, ``[B]`` int32.
            state: Initial state of each layer; zeros if None.
            train: Apply dropout.

        Returns:
            The token vectors and the output of each LSTM layer, each ``[D, B, T, P]``, and the state of each
            layer after the last token.
        """
        outputs, after = [x], []
        for i, lstm in enumerate(self.lstm):
            x = self.drop(outputs[-1], deterministic=not train)
            h, last = lstm(x, lengths, None if state is None else state[i])
            # The recurrent state is h before the skip connection.
            outputs.append(h + x.astype(h.dtype) if self.config.skip and i else h)
            after.append(last)
        return outputs, tuple(after)

    def nll(self, batch: Batch, train: bool = False, negatives: Negatives | None = None) -> dict[str, Array]:
        """Sum -log p(next token) over the documents of a batch.

        Args:
            batch: B documents.
            train: Apply dropout (needs the rng "dropout").
            negatives: Negative samples of the sampled softmax; None computes the full softmax.

        Returns:
            Scalars: ``loss``, the sum over both directions and the only one to differentiate;
            ``nll_forward`` and ``nll_backward``; ``tokens``, predictions per direction; ``words``, tokens of
            the documents.
        """
        lengths = batch.lengths
        x = self.embed_directions(batch, defer_gradient=negatives is None)
        outputs, _ = self.contextualize(x, lengths, None, train)
        h = self.drop(outputs[-1], deterministic=not train)[:, :, :-1]  # [D, B, T - 1, P]
        targets = stack_directions(jnp.asarray(batch.words), jnp.asarray(lengths))[:, :, 1:]
        weight = token_mask(lengths - 1, h.shape[2])[None].astype(jnp.float32)
        metrics = self._sum_nll(h, targets, jnp.broadcast_to(weight, targets.shape), negatives)
        return metrics | {"words": metrics["tokens"] - jnp.sum(batch.weight)}

    def window_nll(
        self, window: Window, state: tuple[State, ...], negatives: Negatives | None = None
    ) -> dict[str, Any]:
        """Sum -log p(next token) over a window of running text, with dropout.

        Args:
            window: Next steps of B streams of text.
            state: State of each layer after the previous window.
            negatives: As in `nll`.

        Returns:
            Metrics as in `nll`, without ``words``, and ``state``, the state after the window, which passes
            no gradient.
        """
        if self.config.input == "words":
            x = self.embedder(window.words[:, :, :-1], negatives is None)
        elif window.unique_words is not None:
            x = self._embed_characters(jnp.asarray(window.chars), window.unique_words)
        else:  # the batch axis goes first, so that each device's tokens are contiguous when flattened
            x = self.embedder(window.chars.swapaxes(0, 1)).swapaxes(0, 1)
        _, batch_size, steps, _ = x.shape  # [D, B, T, E]
        outputs, after = self.contextualize(x, jnp.full(batch_size, steps, jnp.int32), state, True)
        h = self.drop(outputs[-1], deterministic=False)
        metrics = self._sum_nll(h, window.words[:, :, 1:], window.weight, negatives)
        return metrics | {"state": jax.lax.stop_gradient(after)}

    def surprisal(self, h: Array, targets: Array) -> Array:
        """Return -log p of each target ``[...]`` under the full softmax, from top states h ``[..., P]``."""
        h, weight = h.astype(self.config.dtype), jnp.ones(targets.shape, jnp.float32)
        return _compute_nll((h, targets, weight), (*self._softmax_params(), None))[1]

    def _sum_nll(self, h: Array, targets: Array, weight: Array, negatives: Negatives | None):
        per_row = h.astype(self.config.dtype), targets, weight
        loss, nll = sum_over_shards(_compute_nll, per_row, (*self._softmax_params(), negatives))
        forward, backward = jnp.sum(nll * weight, axis=(1, 2))
        return {"loss": loss, "nll_forward": forward, "nll_backward": backward, "tokens": jnp.sum(weight[0])}

    def _softmax_params(self) -> tuple[Array, Array]:
        return self.embedder.table if self.tied else self.softmax_table, self.softmax_bias


def _compute_nll(per_row: tuple[Array, Array, Array], shared: tuple[Array, Array, Negatives | None]):
    """Return the weighted sum of -log p, and -log p of each target in the shape of the targets."""
    h, targets, weight = per_row
    table, bias, negatives = shared
    flat = h.reshape(-1, h.shape[-1]), table, bias, targets.reshape(-1), weight.reshape(-1)
    total, nll = full_nll(*flat) if negatives is None else sampled_nll(*flat, negatives)
    return total, nll.reshape(targets.shape)

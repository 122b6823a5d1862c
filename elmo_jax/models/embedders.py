"""Embedders that map tokens to context-independent vectors: a table of words and a character CNN."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from elmo_jax.config import CharCNNConfig
from elmo_jax.data.characters import IDS
from elmo_jax.parallel import align_varying


class WordEmbedder(nn.Module):
    """Table with one vector per word.

    Attributes:
        vocabulary: V.
        features: E, the width of the vectors.
        dtype: Dtype of the vectors; the table is float32.

    Examples:
        >>> embedder = WordEmbedder(vocabulary=9, features=4)
        >>> vectors, _ = embedder.init_with_output(jax.random.key(0), jnp.array([[1, 2, 3]]))
        >>> vectors.shape
        (1, 3, 4)
    """

    vocabulary: int
    features: int
    dtype: str = "float32"

    def setup(self):
        # A larger init than the usual 1 / sqrt(E) moves early LSTM activations away from zero.
        init = nn.initializers.normal(0.3)
        self.table = self.param("table", init, (self.vocabulary, self.features))

    def __call__(self, words: Array, defer_gradient: bool = False) -> Array:
        """Return the vectors ``[..., E]`` of int32 ids ``[...]``.

        Args:
            words: Word ids.
            defer_gradient: Allocate the table's gradient only once the gradient of the vectors is known.
                XLA otherwise allocates its zeros first, and a large softmax then needs the memory of one
                more table. Forward-mode differentiation does not work with it.
        """
        if defer_gradient:
            return _take_deferred(*align_varying((self.table, words))).astype(self.dtype)
        return jnp.take(self.table, words, axis=0).astype(self.dtype)


@jax.custom_vjp
def _take_deferred(table: Array, words: Array) -> Array:
    return jnp.take(table, words, axis=0)


def _take_deferred_forward(table: Array, words: Array):
    return _take_deferred(table, words), (table, words)


def _take_deferred_backward(residuals: tuple[Array, Array], d_vectors: Array):
    table, words = residuals
    zero = jnp.zeros((), table.dtype)
    # With several devices, the dependence would require communication.
    if d_vectors.size and jax.device_count() == 1:
        # Always 0, but XLA cannot know, so it has to wait for d_vectors.
        value = d_vectors.ravel()[0]
        zero = ((value > 0) & (value < 0)).astype(table.dtype)
    return jnp.broadcast_to(zero, table.shape).at[words].add(d_vectors, mode="drop"), None


_take_deferred.defvjp(_take_deferred_forward, _take_deferred_backward)


class CharCNN(nn.Module):
    """Character CNN with highway layers (Kim et al. 2016), as bilm-tf builds it.

    With the vectors x of a word's characters, for each filter width w::

        y_w = activation(max_t(x[t : t + w] W_w) + b_w)
        y   = [y_1; y_2; ...]

    then for each highway layer::

        g = sigmoid(y W_carry + b_carry)
        y = g * relu(y W_transform + b_transform) + (1 - g) * y

    and, if the number of filters is not E, a projection y W_proj + b_proj. Padding inside a word takes part
    in the maximum, as in bilm-tf.

    Attributes:
        config: Sizes of the CNN.
        features: E, the width of the token vectors.
        dtype: Matmul dtype; accumulation is float32.

    Examples:
        >>> from elmo_jax.data.characters import character_ids
        >>> cnn = CharCNN(CharCNNConfig(filters=((1, 4), (3, 8)), character_features=4), features=6)
        >>> ids = jnp.asarray(character_ids(["no", "<S>", "yes"]))
        >>> cnn.init_with_output(jax.random.key(0), ids)[0].shape
        (3, 6)
    """

    config: CharCNNConfig
    features: int
    dtype: str = "float32"

    @nn.compact
    def __call__(self, characters: Array) -> Array:
        """Return the vectors ``[..., E]`` of int32 character ids ``[..., C]``, 0 for padding tokens."""
        config, d = self.config, self.config.character_features
        # Row 0, for padding tokens, is not a parameter: the official format has 261 rows.
        table = self.param("characters", _uniform_init(1.0), (IDS - 1, d))
        table = jnp.concatenate([jnp.zeros((1, d), table.dtype), table]).astype(self.dtype)
        x = table[characters.reshape(-1, characters.shape[-1])]  # [N, C, d]
        y = jnp.concatenate([self._convolve(i, x) for i in range(len(config.filters))], -1)  # [N, filters]
        for k in range(config.highway):
            gate = jax.nn.sigmoid(self._apply_dense(f"carry_{k}", y, y.shape[-1], -2.0))
            transformed = jax.nn.relu(self._apply_dense(f"transform_{k}", y, y.shape[-1], 0.0))
            y = gate * transformed + (1 - gate) * y
        if config.project_filters or y.shape[-1] != self.features:
            y = self._apply_dense("projection", y, self.features, 0.0)
        return y.reshape(*characters.shape[:-1], self.features).astype(self.dtype)

    def _convolve(self, i: int, x: Array) -> Array:
        """Return y_w ``[N, filters]`` float32 of the i-th filter width for x ``[N, C, d]``."""
        width, count = self.config.filters[i]
        d = x.shape[-1]
        relu = self.config.activation == "relu"
        init = _uniform_init(0.05) if relu else nn.initializers.normal((width * d) ** -0.5)
        kernel = self.param(f"filter_{i}", init, (width, d, count)).astype(self.dtype)
        bias = self.param(f"filter_bias_{i}", nn.initializers.zeros, (count,))
        positions = x.shape[1] - width + 1
        x = jnp.concatenate([x[:, k : k + positions] for k in range(width)], -1)  # [N, positions, width d]
        y = _matmul(x, kernel.reshape(width * d, count)).max(1) + bias[None]
        return jax.nn.relu(y) if relu else jnp.tanh(y)

    def _apply_dense(self, name: str, y: Array, features: int, bias_init: float) -> Array:
        inputs = y.shape[-1]
        kernel = self.param(f"{name}_kernel", nn.initializers.normal(inputs**-0.5), (inputs, features))
        bias = self.param(f"{name}_bias", nn.initializers.constant(bias_init), (features,))
        return _matmul(y, kernel.astype(self.dtype)) + bias[None]


def _matmul(x: Array, w: Array) -> Array:
    """Multiply ``[..., I]`` by ``[I, O]`` in w's dtype, accumulating in float32 or wider."""
    accumulator = np.promote_types(w.dtype, np.float32)
    flat = x.reshape(-1, x.shape[-1]).astype(w.dtype)  # with more axes, XLA:CPU would make transposed copies
    return jnp.matmul(flat, w, preferred_element_type=accumulator).reshape(*x.shape[:-1], w.shape[-1])


def _uniform_init(bound: float):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)

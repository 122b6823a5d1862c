"""Tokens to vectors, independent of their context: by word, or from a word's characters.

Axes: E embedding, V vocabulary, N words, C characters; any leading axes.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from elmo_jax.config import CharCNNConfig
from elmo_jax.data.batching import Documents
from elmo_jax.data.characters import GROUP_SIZE, IDS
from elmo_jax.parallel import align_varying


class WordEmbedder(nn.Module):
    """A row of a table for each word id.

    Attributes:
        vocabulary: V.
        features: E.
        dtype: of the vectors.

    Example:
        >>> import jax
        >>> embedder = WordEmbedder(vocabulary=9, features=4)
        >>> vectors, _ = embedder.init_with_output(jax.random.key(0), jnp.array([[1, 2, 3]]))
        >>> vectors.shape
        (1, 3, 4)
    """

    vocabulary: int
    features: int
    dtype: str = "float32"

    def setup(self):
        # Loud enough for an LSTM to hear from the first step: on AG News 600 steps reach a
        # perplexity of 763, and from 1 / sqrt(E), 0.08, only 1130.
        scale = nn.initializers.normal(0.3)
        self.table = self.param("table", scale, (self.vocabulary, self.features))

    def __call__(self, words: Array) -> Array:
        """int32 ids ``[...]`` to vectors ``[..., E]``."""
        return jnp.take(self.table, words, axis=0).astype(self.dtype)

    def deferred(self, words: Array) -> Array:
        """The same for a loss of large products, whose memory the table's gradient would only take later.

        XLA makes the zeros that a gradient is added to, as many as the table has numbers, when it
        likes, and that is before all else. Here they wait for the vectors' gradient. Forward
        differentiation is not possible, and under `jax.vmap` each example has zeros of its own.
        """
        return _awaited(*align_varying((self.table, words))).astype(self.dtype)


@jax.custom_vjp
def _awaited(table: Array, words: Array) -> Array:
    return jnp.take(table, words, axis=0)


def _awaited_forward(table: Array, words: Array):
    return _awaited(table, words), (table, words)


def _awaited_backward(kept: tuple[Array, Array], d_rows: Array):
    table, words = kept
    zero = jnp.zeros((), table.dtype)
    if d_rows.size and jax.device_count() == 1:  # several would have to tell each other
        some = d_rows.ravel()[0]
        zero = ((some > 0) & (some < 0)).astype(table.dtype)  # 0 whatever it is, and XLA does not know
    zeros = jnp.broadcast_to(zero, table.shape)
    return zeros.at[words].add(d_rows, mode="drop"), None


_awaited.defvjp(_awaited_forward, _awaited_backward)


class CharCNN(nn.Module):
    """A token vector from a word's characters (Kim et al. 2016), in bilm-tf's form.

    x = table[characters]; for every width w, y_w = activation(max_t(x_t:t+w W_w) + b_w);
    y = [y_1; y_2; ...]; K times y = g relu(y W_t + b_t) + (1 - g) y with
    g = sigmoid(y W_c + b_c); and y W_p + b_p where the widths differ.

    Padding inside a word takes part, as it does in bilm-tf.

    Attributes:
        config: its sizes.
        features: E.
        dtype: of the products; sums are float32.

    Example:
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
        """int32 ids ``[..., C]``, 0 for padding tokens, to vectors ``[..., E]``."""
        config, d = self.config, self.config.character_features
        # Row 0, padding tokens, is not stored: the official format has 261 rows.
        table = self.param("characters", _uniform(1.0), (IDS - 1, d))
        table = jnp.concatenate([jnp.zeros((1, d), table.dtype), table]).astype(self.dtype)
        x = table[characters.reshape(-1, characters.shape[-1])]  # [N, C, d]
        y = jnp.concatenate([self._filter(i, x) for i in range(len(config.filters))], -1)
        for k in range(config.highway):
            y = self._highway(k, y)
        if config.project_filters or y.shape[-1] != self.features:
            y = self._dense("projection", y, self.features, 0.0)
        return y.reshape(*characters.shape[:-1], self.features).astype(self.dtype)

    def _filter(self, i: int, x: Array) -> Array:
        """``[N, C, d]`` to the maxima of one kind of filter ``[N, filters]``, float32."""
        width, count = self.config.filters[i]
        d = x.shape[-1]
        relu = self.config.activation == "relu"
        scale = _uniform(0.05) if relu else nn.initializers.normal((width * d) ** -0.5)
        kernel = self.param(f"filter_{i}", scale, (width, d, count)).astype(self.dtype)
        bias = self.param(f"filter_bias_{i}", nn.initializers.zeros, (count,))
        windows = x.shape[1] - width + 1
        x = jnp.concatenate([x[:, k : k + windows] for k in range(width)], -1)  # [N, windows, width d]
        y = _product(x, kernel.reshape(width * d, count))
        y = y.max(1) + bias[None]
        return jax.nn.relu(y) if relu else jnp.tanh(y)

    def _highway(self, k: int, y: Array) -> Array:
        gate = jax.nn.sigmoid(self._dense(f"carry_{k}", y, y.shape[-1], -2.0))
        return gate * jax.nn.relu(self._dense(f"transform_{k}", y, y.shape[-1], 0.0)) + (1 - gate) * y

    def _dense(self, name: str, y: Array, features: int, bias: float) -> Array:
        inputs = y.shape[-1]
        kernel = self.param(f"{name}_kernel", nn.initializers.normal(inputs**-0.5), (inputs, features))
        offset = self.param(f"{name}_bias", nn.initializers.constant(bias), (features,))
        return _product(y, kernel.astype(self.dtype)) + offset[None]


def _product(x: Array, w: Array) -> Array:
    """``[..., I] x [I, O]`` in w's dtype, summed in float32 at least."""
    sums = np.promote_types(w.dtype, np.float32)
    rows = x.reshape(-1, x.shape[-1]).astype(w.dtype)  # of more axes XLA:CPU turns copies, for the gradient
    return jnp.matmul(rows, w, preferred_element_type=sums).reshape(*x.shape[:-1], w.shape[-1])


def _uniform(bound: float):
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def with_device_group_size(documents: Documents) -> Documents:
    """Return the documents with the group size of `UniqueWords` that suits this device.

    A kernel launch on an accelerator takes longer than a small matmul, so groups are larger there.
    """
    on_cpu = jax.default_backend() == "cpu"
    return documents if on_cpu else replace(documents, group_size=4 * GROUP_SIZE)

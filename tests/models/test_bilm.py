"""The biLM against a float64 reference, its causality, and its embedding of unique words."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bilm as reference_bilm

from elmo_jax.config import BiLMConfig, CharCNNConfig
from elmo_jax.data import characters
from elmo_jax.data.batching import Batch, BatchStream, ContiguousStream
from elmo_jax.models.bilm import BiLM, zero_state
from elmo_jax.models.embedders import WordEmbedder
from elmo_jax.ops.softmax import full_nll
from elmo_jax.training.objectives import bilm_loss, bilm_sums, bilm_window_loss, init_params
from elmo_jax.training.step import compiler_options

V = 12
DOCS = [[4, 5, 6, 7, 8], [9], [10, 11, 4]]


@cache
def make(cells=6, **config):
    model = BiLM(BiLMConfig(embedding=6, cells=cells, dropout=0.0, **config), V)
    return model, init_params(model, jax.random.key(0))


@pytest.mark.parametrize("words", [[[3, 1, 3], [0, 3, 1]], [[9, 2], [-1, -7]], [[], []]])
def test_deferred_gradient_equals_plain_gradient(words):
    table = jnp.array(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    words = np.array(words, np.int32)

    def loss(table, deferred):
        vectors = WordEmbedder(5, 4).apply({"params": {"table": table}}, words, deferred)
        # An id outside the table takes no part, but the gradient of its vector is NaN.
        return jnp.sum(jnp.where(words[..., None] < 5, vectors**2, 0)), vectors

    (_, vectors), gradient = jax.value_and_grad(loss, has_aux=True)(table, True)
    (_, plain_vectors), plain_gradient = jax.value_and_grad(loss, has_aux=True)(table, False)
    np.testing.assert_array_equal(vectors, plain_vectors)
    np.testing.assert_allclose(gradient, plain_gradient, rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="XLA of jax 0.12 takes the memory in both cases")
def test_deferred_gradient_takes_no_memory_during_the_softmax():
    size, width = 20_000, 8
    words, table = jnp.full(16, 4), jnp.zeros((size, width))

    def temporary_bytes(deferred):
        def loss(tables):
            h = WordEmbedder(size, width).apply({"params": {"table": tables[0]}}, words, deferred)
            return full_nll(jnp.tanh(h), tables[1], jnp.zeros(size), words, jnp.ones(16))[0]

        def step(tables, moments):
            moments = jax.tree.map(lambda m, g: 0.9 * m + g * g, moments, jax.grad(loss)(tables))
            return jax.tree.map(lambda table, m: table - m, tables, moments), moments

        step = jax.jit(step, donate_argnums=(0, 1), compiler_options=compiler_options(True))
        compiled = step.lower((table, table), (table, table)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes(True) < temporary_bytes(False) - 0.9 * 4 * size * width


def test_loss_takes_numpy_parameters_and_batches_outside_jit():
    model, params = make(layers=1)
    params, batch = jax.tree.map(np.asarray, (params, Batch.of(DOCS)))
    loss = lambda params: bilm_loss(model)(params, batch, jax.random.key(0))[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    assert np.isfinite(value) and jax.tree.structure(gradient) == jax.tree.structure(params)


@pytest.mark.parametrize(("cells", "tie"), [(6, True), (9, False)])
def test_layers_and_loss_equal_reference(cells, tie):
    model, params = make(cells, tie=tie)
    batch = Batch.of(DOCS, shape=(4, 9))  # a filler row, and padding after the longest document
    layers, _ = jax.jit(model.apply)({"params": params}, batch)
    assert layers.shape == (3, 4, 9, 12)
    metrics = jax.jit(bilm_sums(model))(params, batch)
    forward = backward = 0.0
    for b, doc in enumerate(DOCS):
        ids = np.array([1, *doc, 2])
        expected, nll = reference_bilm(params, ids)
        np.testing.assert_allclose(layers[:, b, : len(ids)], expected, rtol=2e-5, atol=1e-6)
        assert not np.any(layers[:, b, len(ids) :])
        forward, backward = forward + nll[0].sum(), backward + nll[1].sum()
    np.testing.assert_allclose(metrics["nll_forward"], forward, rtol=1e-5)
    np.testing.assert_allclose(metrics["nll_backward"], backward, rtol=1e-5)
    assert metrics["tokens"] == sum(len(doc) + 1 for doc in DOCS)
    assert metrics["words"] == sum(map(len, DOCS))
    loss, _ = jax.jit(bilm_loss(model))(params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, (forward + backward) / (2 * metrics["tokens"]), rtol=1e-5)


def test_forward_mode_equals_reverse_mode_with_the_plain_kernel():
    model = BiLM(BiLMConfig(embedding=4, cells=5, dropout=0.0), 9, kernel="plain")
    batch = Batch.of([[4, 5, 6], [7]])
    params = init_params(model, jax.random.key(0))
    f = lambda params: jnp.sin(model.apply({"params": params}, batch)[0]).sum()  # noqa: E731
    direction = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    _, forward = jax.jit(lambda p, d: jax.jvp(f, (p,), (d,)))(params, direction)
    products = jax.tree.map(jnp.vdot, jax.jit(jax.grad(f))(params), direction)
    np.testing.assert_allclose(forward, sum(jax.tree.leaves(products)), rtol=1e-4)


def test_no_direction_sees_its_target_at_any_layer():
    model, params = make()
    n = 7
    # Tokens 0, 1, 2 ...: row t of the table is the vector of position t.
    batch = Batch(jnp.arange(n)[None], jnp.array([n]), None, jnp.ones(1))

    def layers(table):
        return model.apply({"params": params | {"embedder": {"table": table}}}, batch)[0][:, 0]

    jacobian = jax.jit(jax.jacobian(layers))(params["embedder"]["table"])[:, :, :, :n]  # [L, T, F, T', E]
    depends = np.asarray(jnp.abs(jacobian)) > 0
    for layer in (1, 2):
        forward, backward = depends[layer, :, :6].any((1, 3)), depends[layer, :, 6:].any((1, 3))
        np.testing.assert_array_equal(forward, np.tri(n, dtype=bool))
        np.testing.assert_array_equal(backward, np.tri(n, dtype=bool).T)


def test_carried_state_continues_the_document():
    model, params = make()
    words = np.array([[1, 4, 5, 6, 7, 8, 9, 2]])

    @jax.jit
    def read(words, state):
        lengths = jnp.array([words.shape[1]])
        return model.apply({"params": params}, Batch(words, lengths, None, jnp.ones(1)), state)

    start = zero_state(model.config, 1)
    expected, _ = read(words, start)
    first, state = read(words[:, :4], start)
    second, _ = read(words[:, 4:], state)
    joined = np.concatenate([first[..., :6], second[..., :6]], axis=2)  # forward half
    np.testing.assert_allclose(joined, expected[..., :6], atol=1e-6)


def test_sampling_all_classes_equals_full_softmax_and_dropout_is_seeded():
    model, params = make()
    batch = Batch.of(DOCS)
    full, sampled = (jax.jit(bilm_loss(model, n))(params, batch, jax.random.key(1))[0] for n in (None, V))
    np.testing.assert_allclose(full, sampled, rtol=1e-5)
    with_dropout = BiLM(replace(model.config, dropout=0.5), V)
    loss = jax.jit(bilm_loss(with_dropout))
    one, same, other = (loss(params, batch, jax.random.key(k))[0] for k in (1, 1, 2))
    assert one == same != other
    evaluated, expected = (jax.jit(bilm_sums(m))(params, batch) for m in (with_dropout, model))
    assert evaluated == expected


CNN = CharCNNConfig(filters=((1, 3), (2, 4)), character_features=3, highway=1)


@pytest.fixture
def character_documents(documents, rng):
    """Documents with the characters of 50 ids, which from 40 on differ in their characters alone."""
    character_ids = rng.integers(1, 262, (50, characters.CHARACTERS)).astype(np.int32)
    return replace(documents, character_ids=character_ids, vocabulary_size=40, group_size=8)


def first_batch(stream):
    return jax.tree.map(lambda a: a[0], next(stream.chunks(0, 1)).batches)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_unique_words_are_embedded_like_every_word(character_documents, rng, dtype, tolerance):
    config = BiLMConfig(embedding=4, cells=4, layers=1, input="characters", characters=CNN, dtype=dtype)
    model = BiLM(config, 40)
    batch = first_batch(BatchStream(character_documents, 6, seed=0))
    first, inverse = batch.unique_words
    assert len(first) < inverse.size / 8
    is_unused = np.ones(inverse.size, bool)
    is_unused[first.ravel()] = False
    changed = np.where(is_unused.reshape(inverse.shape)[..., None], 7, batch.chars)
    more_groups = batch.unique_words._replace(first=np.pad(first, ((0, 3), (0, 0))))
    cotangent = rng.normal(size=(2, *inverse.shape, 4))

    @jax.jit
    def embed(params, batch):
        def total(params):
            vectors = model.apply({"params": params}, batch, method="embed_directions").astype("float32")
            return jnp.sum(vectors * jnp.asarray(cotangent, jnp.float32)), vectors

        return jax.value_and_grad(total, has_aux=True)(params)

    params = init_params(model, jax.random.key(0))
    unique = embed(params, batch)
    for same in (replace(batch, chars=changed), replace(batch, unique_words=more_groups)):
        jax.tree.map(np.testing.assert_array_equal, embed(params, same), unique)
    every = embed(params, replace(batch, unique_words=None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, tolerance, tolerance), unique, every)


def test_windows_with_unique_words_have_the_loss_of_every_word(character_documents):
    model = BiLM(BiLMConfig(embedding=4, cells=4, layers=1, input="characters", characters=CNN), 40)
    window = first_batch(ContiguousStream(character_documents, 6, 5, seed=0))
    params = init_params(model, jax.random.key(0)) | {"state": zero_state(model.config, 6)}
    loss = jax.jit(lambda window: bilm_window_loss(model)(params, window, jax.random.key(1)))
    unique, every = loss(window), loss(replace(window, unique_words=None))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), unique, every)


def test_unique_words_of_another_batch_are_an_error():
    config = BiLMConfig(embedding=4, cells=4, input="characters")
    batch = Batch.of([[4, 5], [6, 7]]).replace(chars=np.ones((2, 4, 50), np.int32))
    batch = batch.replace(unique_words=characters.UniqueWords(np.zeros((2, 8), int), np.zeros((2, 3), int)))
    with pytest.raises(ValueError, match="set it to None"):
        BiLM(config, 9).init(jax.random.key(0), batch)


def test_gradient_of_a_frequent_word_accumulates_in_float32():
    cnn = CharCNNConfig(filters=((1, 3),), character_features=3, highway=0, project_filters=True)
    config = BiLMConfig(embedding=4, cells=4, layers=1, input="characters", characters=cnn, dtype="bfloat16")
    model, count = BiLM(config, 9), 1024  # bfloat16 counts to 256 only
    batch = Batch.of([[4] * count]).replace(chars=np.ones((1, count + 2, 50), np.int32))
    batch = batch.replace(unique_words=characters.find_unique_words(np.asarray(batch.words), axes=2))

    def total(params):
        vectors = model.apply({"params": params}, batch, method="embed_directions")
        return jnp.sum(vectors[0].astype(float))

    gradient = jax.jit(jax.grad(total))(init_params(model, jax.random.key(0)))
    np.testing.assert_allclose(gradient["embedder"]["projection_bias"], count + 2, rtol=0.01)

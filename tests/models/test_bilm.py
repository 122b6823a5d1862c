from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import bilm as oracle

from elmo_jax.config import OptimizerConfig
from elmo_jax.data import characters
from elmo_jax.data.batching import Batch, BatchStream, ContiguousStream
from elmo_jax.models import embedders
from elmo_jax.models.bilm import BiLM, BiLMConfig, zero_state
from elmo_jax.models.embedders import CharCNN, CharCNNConfig, WordEmbedder
from elmo_jax.training.objectives import bilm_loss, bilm_sums, bilm_window_loss, init_params
from elmo_jax.training.optimizers import make_optimizer
from elmo_jax.training.step import TrainState, compiler_options, train_step

V = 12
DOCS = [[4, 5, 6, 7, 8], [9], [10, 11, 4]]


def by_position(n):
    """A document of the tokens 0, 1, 2 ...: each row of the table is the token of one position."""
    return Batch(jnp.arange(n)[None], jnp.array([n]), None, jnp.ones(1))


@cache
def make(cells=6, **more):
    model = BiLM(BiLMConfig(embedding=6, cells=cells, dropout=0.0, **more), V)
    return model, jax.jit(model.init)(jax.random.key(0), Batch.of(DOCS))["params"]


@pytest.mark.parametrize("words", [[[3, 1, 3], [0, 3, 1]], [[9, 2], [-1, -7]], [[], []]])
def test_an_awaited_gradient_is_the_one_that_would_be(words):
    table = jnp.array(np.random.default_rng(0).normal(size=(5, 4)), jnp.float32)
    words = np.array(words, np.int32)

    def loss(table, deferred):
        vectors = WordEmbedder(5, 4).apply({"params": {"table": table}}, words, deferred)
        is_finite = jnp.where(
            words[..., None] < 5, vectors**2, 0
        )  # and yet NaN flows back to an id that is none
        return jnp.sum(is_finite), vectors

    (_, vectors), gradient = jax.value_and_grad(loss, has_aux=True)(table, True)
    (_, enabled), expected = jax.value_and_grad(loss, has_aux=True)(table, False)
    np.testing.assert_array_equal(vectors, enabled)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    assert np.isfinite(gradient).all()


def test_parameters_and_batches_of_numpy_will_do_without_a_compiler():
    model, params = make()
    params, batch = jax.tree.map(np.asarray, (params, Batch.of(DOCS)))
    loss = lambda params: bilm_loss(model)(params, batch, jax.random.key(0))[0]  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(params)
    assert np.isfinite(value) and jax.tree.structure(gradient) == jax.tree.structure(params)


def test_while_the_softmax_works_there_is_no_gradient_of_the_token_vectors_yet(monkeypatch):
    words, width = 20_000, 8
    model = BiLM(BiLMConfig(embedding=width, cells=width, layers=1, tie=False), words)
    optimizer, batch = make_optimizer(OptimizerConfig(), 10), Batch.of([[4] * 7], shape=(1, 9))
    state = jax.eval_shape(lambda: TrainState.create(init_params(model, jax.random.key(0)), optimizer))

    def scratch():
        take = lambda state: train_step(state, batch, jax.random.key(0), bilm_loss(model), optimizer)[0]  # noqa: E731
        step = jax.jit(take, donate_argnums=0, compiler_options=compiler_options(True))
        return step.lower(state).compile().memory_analysis().temp_size_in_bytes

    needed = scratch()
    monkeypatch.setattr(embedders, "_take_deferred", lambda table, words: jnp.take(table, words, axis=0))
    assert needed < scratch() - 0.9 * 4 * words * width


@pytest.mark.parametrize(("cells", "tie"), [(6, True), (9, False)])
def test_layers_and_loss_are_the_oracles(cells, tie):
    model, params = make(cells, tie=tie)
    batch = Batch.of(DOCS, shape=(4, 9))  # a filler row, and padding behind the longest
    layers, _ = jax.jit(model.apply)({"params": params}, batch)
    assert layers.shape == (3, 4, 9, 12)
    sums = jax.jit(bilm_sums(model))(params, batch)
    forward = backward = 0.0
    for b, doc in enumerate(DOCS):
        ids = np.array([1, *doc, 2])
        want, nlls = oracle(params, ids)
        np.testing.assert_allclose(layers[:, b, : len(ids)], want, rtol=2e-5, atol=1e-6)
        assert not np.any(layers[:, b, len(ids) :])
        forward, backward = forward + nlls[0].sum(), backward + nlls[1].sum()
    np.testing.assert_allclose(sums["nll_forward"], forward, rtol=1e-5)
    np.testing.assert_allclose(sums["nll_backward"], backward, rtol=1e-5)
    assert sums["tokens"] == sum(len(doc) + 1 for doc in DOCS)
    assert sums["words"] == sum(map(len, DOCS))
    loss, _ = jax.jit(bilm_loss(model))(params, batch, jax.random.key(0))
    np.testing.assert_allclose(loss, (forward + backward) / (2 * sums["tokens"]), rtol=1e-5)


def test_layer_0_is_the_token_vector_beside_itself():
    model, params = make()
    layers, _ = model.apply({"params": params}, Batch.of(DOCS))
    np.testing.assert_array_equal(layers[0, :, :, :6], layers[0, :, :, 6:])


def test_no_direction_sees_its_target_at_any_layer():
    """The state that predicts a token does not depend on it, nor on any that is read later."""
    model, params = make()
    doc = np.array([1, *DOCS[0], 2])
    n = len(doc)

    def layers(vectors):
        return model.apply({"params": params | {"embedder": {"table": vectors}}}, by_position(n))[0][:, 0]

    jacobian = jax.jit(jax.jacobian(layers))(params["embedder"]["table"])[:, :, :, :n]  # [L, T, F, T', E]
    sees = np.asarray(jnp.abs(jacobian))
    for layer in (1, 2):
        forward, backward = sees[layer, :, :6].max((1, 3)), sees[layer, :, 6:].max((1, 3))
        assert (np.triu(forward, 1) == 0).all() and (np.tril(forward) > 0)[np.tril_indices(n)].all()
        assert (np.tril(backward, -1) == 0).all() and (np.triu(backward) > 0)[np.triu_indices(n)].all()


def test_the_loss_of_a_step_has_no_gradient_from_its_target_on():
    model, params = make()
    doc = np.array([1, *DOCS[0], 2])
    n = len(doc)

    def step_losses(vectors, direction):
        embedded = params | {"embedder": {"table": vectors}}
        x = model.apply({"params": embedded}, by_position(n), method="embed_directions")
        outputs, _ = model.apply({"params": embedded}, x, jnp.array([n]), method="contextualize")
        h = outputs[-1][direction, 0, :-1]
        log_p = jax.nn.log_softmax(h @ params["embedder"]["table"].T)  # not through the vectors
        targets = doc[1:] if direction == 0 else doc[::-1][1:]
        return -log_p[jnp.arange(n - 1), targets]

    for direction in (0, 1):
        g = jax.jit(jax.jacobian(step_losses), static_argnums=1)(params["embedder"]["table"], direction)[
            :, :n
        ]  # [t, T', E]
        sees = np.asarray(jnp.abs(g)).max(-1)
        sees = sees if direction == 0 else sees[:, ::-1]  # positions in reading order
        assert (np.triu(sees, 1) == 0).all()
        assert (sees[np.tril_indices(n - 1)] > 0).all()


def test_a_document_is_the_same_in_any_batch():
    model, params = make()
    alone, _ = model.apply({"params": params}, Batch.of([DOCS[2]]))
    among, _ = model.apply({"params": params}, Batch.of(DOCS, shape=(5, 13)))
    np.testing.assert_allclose(alone[:, 0], among[:, 2, :5], atol=1e-6)


def test_carried_state_is_one_long_reading():
    model, params = make()
    words = np.array([[1, 4, 5, 6, 7, 2]])
    read = lambda w, s=None: model.apply(  # noqa: E731
        {"params": params}, Batch(jnp.asarray(w), jnp.array([w.shape[1]]), None, jnp.ones(1)), s
    )
    whole, _ = read(words)
    first, state = read(words[:, :4])
    second, _ = read(words[:, 4:], state)
    joined = np.concatenate([first[..., :6], second[..., :6]], axis=2)
    np.testing.assert_allclose(joined, whole[..., :6], atol=1e-6)


def test_sampled_training_is_full_over_all_classes_and_dropout_is_seeded():
    model, params = make()
    batch = Batch.of(DOCS)
    full, sampled = (jax.jit(bilm_loss(model, n))(params, batch, jax.random.key(1))[0] for n in (None, V))
    np.testing.assert_allclose(full, sampled, rtol=1e-5)
    wet = BiLM(BiLMConfig(embedding=6, cells=6, dropout=0.5), V)
    wet_loss = jax.jit(bilm_loss(wet))
    one, same, other = (wet_loss(params, batch, jax.random.key(k))[0] for k in (1, 1, 2))
    assert one == same != other
    dry, plain = (jax.jit(bilm_sums(m))(params, batch) for m in (wet, model))
    assert dry == plain


def test_characters_in_bfloat16_need_no_promotion_of_dtypes():
    cnn = CharCNNConfig(filters=((1, 3), (2, 4)), character_features=3, highway=1)
    chars = jnp.ones((2, 50), jnp.int32)
    vectors, _ = CharCNN(cnn, 5, "bfloat16").init_with_output(jax.random.key(0), chars)
    assert vectors.shape == (2, 5) and vectors.dtype == jnp.bfloat16


@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-6), ("bfloat16", 3e-3)])
@pytest.mark.parametrize("windows", [False, True])
def test_words_spelled_once_are_the_words_spelled_each_time(documents, rng, windows, dtype, near):
    cnn = CharCNNConfig(filters=((1, 3), (2, 4)), character_features=3, highway=1)
    config = BiLMConfig(embedding=4, cells=4, layers=1, input="characters", characters=cnn, dtype=dtype)
    model = BiLM(config, 40)
    character_ids = rng.integers(1, 262, (50, characters.CHARACTERS)).astype(np.int32)
    # Ids from 40 on differ in their characters alone.
    documents = replace(documents, character_ids=character_ids, vocabulary_size=40, group_size=8)
    if windows:
        stream, task = (
            ContiguousStream(documents, 6, 5, seed=0, steps_per_call=2),
            bilm_window_loss(model),
        )
    else:
        stream, task = BatchStream(documents, 6, seed=0, steps_per_call=2), bilm_loss(model)
    params = init_params(model, jax.random.key(0))
    params |= {"state": zero_state(model.config, 6)} if windows else {}
    batch = jax.tree.map(lambda a: a[0], next(stream.chunks(0, 2)).batches)
    assert len(batch.unique_words.first) < batch.unique_words.inverse.size / 8
    more = batch.unique_words._replace(first=np.pad(batch.unique_words.first, ((0, 3), (0, 0))))
    loss = jax.jit(jax.value_and_grad(lambda params, batch: task(params, batch, jax.random.key(1))[0]))
    unread = np.ones(batch.unique_words.inverse.size, bool)
    unread[batch.unique_words.first.ravel()] = False
    spoilt = np.where(unread.reshape(batch.unique_words.inverse.shape)[..., None], 7, batch.chars)
    once, padded, each = (
        loss(params, replace(batch, unique_words=d)) for d in (batch.unique_words, more, None)
    )
    jax.tree.map(np.testing.assert_array_equal, padded, once)  # however many others of a dispatch have
    jax.tree.map(np.testing.assert_array_equal, loss(params, replace(batch, chars=spoilt)), once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=10 * near, atol=near), once, each)


def test_words_that_differ_in_another_batch_are_refused():
    config = BiLMConfig(embedding=4, cells=4, input="characters")
    batch = Batch.of([[4, 5], [6, 7]]).replace(chars=np.ones((2, 4, 50), np.int32))
    batch = batch.replace(unique_words=characters.UniqueWords(np.zeros((2, 8), int), np.zeros((2, 3), int)))
    with pytest.raises(ValueError, match="set it to None"):
        BiLM(config, 9).init(jax.random.key(0), batch)


def test_gradients_of_a_frequent_word_are_summed_in_float32():
    cnn = CharCNNConfig(filters=((1, 3),), character_features=3, highway=0, project_filters=True)
    model = BiLM(BiLMConfig(embedding=4, cells=4, input="characters", characters=cnn, dtype="bfloat16"), 9)
    often = 1024  # times 1 is more than bfloat16 counts to
    batch = Batch.of([[4] * often]).replace(chars=np.ones((1, often + 2, 50), np.int32))
    batch = batch.replace(unique_words=characters.find_unique_words(np.asarray(batch.words), axes=2))
    params = init_params(model, jax.random.key(0))

    def total(params):
        vectors = model.apply({"params": params}, batch, method="embed_directions")
        return jnp.sum(vectors[0].astype(float))

    bias = jax.grad(total)(params)["embedder"]["projection_bias"]
    np.testing.assert_allclose(bias, often + 2, rtol=0.01)

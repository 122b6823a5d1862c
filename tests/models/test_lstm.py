import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
from reference import lstm as oracle, tree64

from elmo_jax.models.lstm import LSTM, reverse_valid, token_mask
from elmo_jax.ops import lstm as fast
from elmo_jax.ops.lstm import Clips, State, Weights

T, D, B, I, H, P = 5, 2, 3, 4, 6, 3  # noqa: E741
LENGTHS = jnp.array([5, 2, 0])
CASES = {
    "plain cell": (None, Clips()),
    "projection": (P, Clips()),
    "clips": (P, Clips(0.2, 0.1)),
    "cell clip": (None, Clips(0.2, None)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request, x64):
    """A layer of each kernel, their parameters in float64, an input and a first state."""
    projection, clips = request.param
    layers = {k: LSTM(H, projection, clips, "float64", k) for k in ("fast", "plain")}
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (D, B, T, I), jnp.float64)
    params = layers["fast"].init(keys[1], x, LENGTHS)["params"]
    leaves = jax.tree.leaves(params)
    params = jax.tree.unflatten(
        jax.tree.structure(params),
        [
            jax.random.normal(k, a.shape, jnp.float64)
            for k, a in zip(jax.random.split(keys[2], len(leaves)), leaves, strict=True)
        ],
    )
    out = projection or H
    state = State(
        *(
            0.1 * jax.random.normal(k, (D, B, n), jnp.float64)
            for k, n in zip(jax.random.split(keys[3]), (H, out), strict=True)
        )
    )
    return layers, params, x, state, clips


# Shape of the gates in a program: all directions, one direction, one direction transposed.
LAYOUTS = {
    "joined": f"[{D},{B},{T * 4 * H}]",
    "split": f"[{B},{T * 4 * H}]",
    "transposed": f"[{4 * H},{T * B}]",
}


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    """Memory layout of the kernel "fast"."""
    monkeypatch.setattr(fast, "_SPLIT_MAX_BYTES", 0 if request.param == "joined" else np.inf)
    monkeypatch.setattr(fast, "_TRANSPOSE_MIN_ROWS", B if request.param == "transposed" else B + 1)
    return request.param


def test_mask_is_true_on_real_steps():
    assert token_mask(jnp.array([2, 0]), 3).tolist() == [[True, True, False], [False] * 3]


@pytest.mark.parametrize("kernel", ["fast", "plain"])
def test_layer_is_the_equations(case, kernel, layout):
    layers, params, x, state, clips = case
    h, last = layers[kernel].apply({"params": params}, x, LENGTHS, state)
    p = tree64(params)
    for d in range(D):
        for b, n in enumerate(LENGTHS.tolist()):
            cs, hs = oracle(
                np.asarray(x[d, b, :n]),
                p["input_kernel"][d],
                p["recurrent_kernel"][d],
                p["bias"][d],
                p["projection_kernel"][d] if "projection_kernel" in p else None,
                np.asarray(state.c[d, b]),
                np.asarray(state.h[d, b]),
                clips.cell or np.inf,
                clips.projection or np.inf,
            )
            if n:
                np.testing.assert_allclose(h[d, b, :n], hs, rtol=1e-10)
            np.testing.assert_allclose(last.c[d, b], cs[-1] if n else state.c[d, b], rtol=1e-10)
            np.testing.assert_allclose(last.h[d, b], hs[-1] if n else state.h[d, b], rtol=1e-10)


@pytest.mark.parametrize("uses_state", [False, True])
def test_fast_gradient_is_the_plain_ones(case, uses_state, layout):
    layers, params, x, state, _ = case

    def loss(params, x, state, kernel):
        h, last = layers[kernel].apply({"params": params}, x, LENGTHS, state)
        real = jnp.where(
            jnp.arange(T, dtype=jnp.int32)[None, None, :, None] < LENGTHS[None, :, None, None], h, 0
        )
        weight = jnp.cos(jnp.arange(h.size, dtype=jnp.float64)).reshape(h.shape)
        return jnp.sum(weight * real**2) + (jnp.sum(jnp.sin(last.c)) + jnp.sum(last.h) if uses_state else 0)

    program = str(jax.make_jaxpr(lambda *given: loss(*given, "fast"))(params, x, state))
    assert {how for how, gates in LAYOUTS.items() if gates in program} == {layout}
    got, want = (jax.grad(loss, argnums=(0, 1, 2))(params, x, state, k) for k in ("fast", "plain"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), got, want)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(got))


def test_layout_of_sharded_rows_is_not_transposed(monkeypatch):
    monkeypatch.setattr(fast, "_TRANSPOSE_MIN_ROWS", 0)
    x = jnp.zeros((D, B, T, I))
    params = LSTM(H).init(jax.random.key(1), x, LENGTHS)
    with jax.set_mesh(jax.make_mesh((1,), ("data",))):
        assert LAYOUTS["split"] in str(jax.make_jaxpr(lambda x: LSTM(H).apply(params, x, LENGTHS))(x))


def test_a_step_is_a_slice_of_all_and_not_a_gather(layout):
    x, w_x = jnp.zeros((D, B, T, I)), jnp.zeros((D, I, 4 * H))
    w = Weights(jnp.zeros((D, H, 4 * H)), jnp.zeros((D, 4 * H)), None)
    state = State(jnp.zeros((D, B, H)), jnp.zeros((D, B, H)))
    run = lambda x, w_x, w: jnp.sum(fast.run_fast(x, state, w_x, w, Clips()).h)  # noqa: E731
    program = str(jax.make_jaxpr(jax.grad(run, argnums=(0, 1, 2)))(x, w_x, w))
    assert "dynamic_update_slice" in program and "gather" not in program and "scatter" not in program


def test_a_program_may_leave_the_number_of_rows_open():
    params = LSTM(H).init(jax.random.key(0), jnp.zeros((D, 1, T, I)), jnp.zeros(1, jnp.int32))
    run = jax.jit(lambda x, lengths: LSTM(H, kernel="fast").apply(params, x, lengths)[0])
    rows = jax.export.symbolic_shape("rows")[0]
    shapes = [jax.ShapeDtypeStruct((D, rows, T, I), "float32"), jax.ShapeDtypeStruct((rows,), "int32")]
    exported = jax.export.export(run)(*shapes)
    x = jax.random.normal(jax.random.key(1), (D, B, T, I))
    np.testing.assert_allclose(exported.call(x, LENGTHS), run(x, LENGTHS), rtol=1e-6)


def test_fast_is_plain_in_float32(layout):
    x = jax.random.normal(jax.random.key(0), (D, B, T, I))
    params = LSTM(H, P).init(jax.random.key(1), x, LENGTHS)
    both = [
        jax.value_and_grad(lambda p, k=k: jnp.sum(LSTM(H, P, kernel=k).apply(p, x, LENGTHS)[0] ** 2))(params)
        for k in ("fast", "plain")
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *both)


def test_directions_are_independent():
    x = jax.random.normal(jax.random.key(0), (D, B, T, I))
    params = LSTM(H).init(jax.random.key(1), x, LENGTHS)
    run = lambda x: LSTM(H).apply(params, x, LENGTHS)[0]  # noqa: E731
    changed = run(x.at[1].add(1.0))
    np.testing.assert_array_equal(changed[0], run(x)[0])
    assert not np.array_equal(changed[1], run(x)[1])


def test_bfloat16_stays_near_float32(layout):
    x = jax.random.normal(jax.random.key(0), (D, B, T, I))
    params = LSTM(H, P).init(jax.random.key(1), x, LENGTHS)
    full, half = (LSTM(H, P, dtype=d).apply(params, x, LENGTHS)[0] for d in ("float32", "bfloat16"))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, full, atol=0.02)
    assert not np.array_equal(half, full)


@pytest.mark.parametrize("steps", [1, T])
def test_bfloat16_has_gradients_of_all_it_is_given(layout, steps):
    x, lengths = jax.random.normal(jax.random.key(0), (D, B, steps, I)), jnp.full(B, steps, jnp.int32)
    state = State(jnp.full((D, B, H), 0.1), jnp.full((D, B, H), -0.1))
    params = LSTM(H).init(jax.random.key(1), x, lengths)

    def loss(params, x, state, dtype):
        return jnp.sum(LSTM(H, dtype=dtype, kernel="fast").apply(params, x, lengths, state)[0] ** 2)

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    half, full = (gradient(params, x, state, dtype) for dtype in ("bfloat16", "float32"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.05), half, full)


@pytest.mark.parametrize("shape", [(3, 5), (3, 5, 2)])
def test_reverse_is_slicing_and_its_own_inverse(shape):
    x = jnp.arange(np.prod(shape)).reshape(shape)
    y = reverse_valid(x, LENGTHS)
    for b, n in enumerate(LENGTHS.tolist()):
        np.testing.assert_array_equal(y[b, :n], x[b, :n][::-1])
        np.testing.assert_array_equal(y[b, n:], x[b, n:])
    np.testing.assert_array_equal(reverse_valid(y, LENGTHS), x)


def test_reverse_gradient_is_the_numerical_one():
    x = jax.random.normal(jax.random.key(0), (3, 5, 2))
    f = lambda x: jnp.sum(jnp.sin(reverse_valid(x, LENGTHS) * jnp.arange(5.0)[None, :, None]))  # noqa: E731
    jax.test_util.check_grads(f, (x,), order=1, modes=["rev", "fwd"], rtol=1e-2)


@pytest.mark.parametrize("kernel", ["fast", "plain"])
@pytest.mark.parametrize(("rows", "steps"), [(0, 3), (2, 0)])
def test_of_no_steps_the_first_state_comes_back(kernel, rows, steps):
    layer = LSTM(3, projection=2, kernel=kernel)
    state = State(jnp.ones((2, rows, 3)), jnp.ones((2, rows, 2)))
    given = jnp.ones((2, rows, steps, 4)), jnp.zeros(rows, jnp.int32), state
    (h, after), _ = layer.init_with_output(jax.random.key(0), *given)
    assert h.shape == (2, rows, steps, 2) and h.dtype == jnp.float32
    jax.tree.map(np.testing.assert_array_equal, after, state)

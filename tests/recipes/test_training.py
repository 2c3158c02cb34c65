import jax.numpy as jnp
import numpy as np
import optax

from penalties_jax.recipes.training import adam, compile_chunk, train


def step(state, data, index):
    return state + data, {"loss": state, "index": index.astype(float)}


def test_chunks_of_any_length_are_one_program_with_mean_metrics():
    chunk = compile_chunk(step)
    rows = []
    state = train(
        chunk,
        jnp.float32(0),
        jnp.float32(2),
        first=3,
        last=12,
        every=5,
        title="test",
        record=lambda done, state, metrics: rows.append((done, float(state), metrics)),
    )
    assert float(state) == 18
    assert [(done, state) for done, state, _ in rows] == [(5, 4), (10, 14), (12, 18)]
    np.testing.assert_allclose([metrics["loss"] for *_, metrics in rows], [1, 8, 15])
    np.testing.assert_allclose([metrics["index"] for *_, metrics in rows], [3.5, 7, 10.5])
    assert chunk._cache_size() == 1


def test_no_steps_leave_the_state():
    assert train(compile_chunk(step), 7, 1, first=4, last=4, every=2, title="test") == 7


def test_adam_trains_from_one_step_up():
    for steps in (1, 10):
        optimizer = adam(0.1, steps)
        value = jnp.float32(1)
        state = optimizer.init(value)
        for _ in range(steps):
            updates, state = optimizer.update(2 * value, state, value)
            value = optax.apply_updates(value, updates)
        assert value < 0.95

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from penalties_jax.recipes.language_model import LanguageModel, mean_loss, with_adapters


@nnx.jit
def make_model():
    return LanguageModel(width=16, layers=2, heads=2, context=12, rngs=nnx.Rngs(0))


def test_a_byte_changes_no_earlier_prediction():
    model, text = make_model(), jnp.arange(12)[None]
    changed = text.at[0, 7].set(200)
    predict = nnx.jit(model)
    before, after = predict(text), predict(changed)
    assert before.shape == (1, 12, 256)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert jnp.all(jnp.any(before[:, 7:] != after[:, 7:], axis=-1))


def test_mean_loss_of_uniform_predictions():
    loss = mean_loss(jnp.zeros((2, 3, 256)), jnp.zeros((2, 3), int))
    np.testing.assert_allclose(loss, np.log(256), rtol=1e-6)


def test_adapters_start_as_the_model_and_then_change_it():
    model, text = make_model(), jnp.arange(12)[None]
    adapted = with_adapters(model, 3, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(adapted(text), model(text), atol=1e-5)

    graph, adapters, rest = nnx.split(adapted, nnx.LoRAParam, ...)
    assert len(jax.tree.leaves(adapters)) == 2 * 4 * 2
    assert len(jax.tree.leaves(rest)) == len(jax.tree.leaves(nnx.state(model)))
    moved = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    assert jnp.abs(nnx.merge(graph, moved, rest)(text) - model(text)).max() > 0.1


def test_adapters_leave_the_original_alone():
    model = make_model()
    with_adapters(model, 3, rngs=nnx.Rngs(1))
    assert isinstance(model.blocks[0].attention.out, nnx.Linear)

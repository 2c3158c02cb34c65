"""What the guide to Tunix makes, a trainer, a strategy and a policy loss, in Tunix itself."""

import re
import shutil
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import penalties_jax as pj

pytestmark = [
    pytest.mark.skipif(find_spec("tunix") is None, reason="google-tunix isn't installed"),
    # Of Tunix, of its qwix, and of what Tunix calls and asks to be called.
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:(tunix|qwix)",
        "ignore:optax.global_norm:DeprecationWarning",
        "ignore:.with mesh:DeprecationWarning",
    ),
]

GUIDE = Path(__file__).parent.parent / "docs/guides/tunix.md"
RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 16, (8, 4, 6))
REFERENCE = RNG.normal(size=(8, 4, 6, 16)).astype(np.float32)
BATCHES = [{"tokens": x, "reference": y} for x, y in zip(TOKENS, REFERENCE, strict=True)]


@pytest.fixture(scope="module")
def guide():
    """The names that the guide's examples define."""
    names = {"__name__": "__main__"}
    text = GUIDE.read_text(encoding="utf-8")
    for example in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        exec(compile(example, str(GUIDE), "exec"), names)
    return SimpleNamespace(**names)


def trainer(guide, tuned, mesh, root=None):
    """A trainer that remembers what each call of the loss saw: (mode, step, weight, loss)."""
    import orbax.checkpoint as ocp
    import qwix
    from tunix import TrainingConfig

    class Recorded(guide.AnnealedTrainer):
        def _post_process_train_step(self, metrics):
            super()._post_process_train_step(metrics)
            self.record(metrics, self._buffered_train_metrics)

        def _post_process_eval_step(self, metrics):
            self.record(metrics, self._buffered_eval_metrics)

        def record(self, metrics, buffered):
            weight, loss = float(metrics["kl/weight"]), float(buffered.losses[-1])
            self.seen.append((str(self._mode), buffered.step, weight, loss))
            steps = self.model.step, self.model.penalty.step, self.optimizer.opt_state.gradient_step
            assert len({int(step[...]) for step in steps}) == 1

    model = guide.Model(nnx.Rngs(0))
    if tuned == "LoRA":
        provider = qwix.LoraProvider(module_path="hidden|head", rank=2, alpha=2.0)
        model = qwix.apply_lora_to_model(model, provider, TOKENS[0], rngs=nnx.Rngs(1))
    if mesh:
        split, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
        state = nnx.state(model)
        places = jax.tree.map(lambda x: split if x.ndim == 2 else whole, state)
        nnx.update(model, jax.device_put(state, places))
    config = TrainingConfig(
        eval_every_n_steps=1,
        max_steps=4,
        gradient_accumulation_steps=2,
        checkpoint_root_directory=root and str(root),
        checkpointing_options=ocp.CheckpointManagerOptions(save_interval_steps=2),
    )
    made = Recorded(model, optax.adam(0.1), config).with_loss_fn(guide.loss, has_aux=True)
    made.seen = []
    return made


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("tuned", ["full", "LoRA"])
def test_weights_follow_the_steps_of_the_optimizer(guide, tmp_path, tuned, devices):
    mesh = devices > 1 and jax.make_mesh(
        (devices,), ("fsdp",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    with mesh or nullcontext():
        whole = trainer(guide, tuned, mesh, tmp_path / "whole")
        whole.train(BATCHES, BATCHES[:1])

        shutil.copytree(tmp_path / "whole" / "2", tmp_path / "half" / "2")
        resumed = trainer(guide, tuned, mesh, tmp_path / "half")
        assert resumed.train_steps == 2
        resumed.train(BATCHES, BATCHES[:1])

    evaluations = [("eval", step, step / 4) for step in range(5)]
    trainings = [("train", step, step / 4) for step in range(4)]
    expected = evaluations[:1]
    for training, evaluation in zip(trainings, evaluations[1:], strict=True):
        expected += [training, training, evaluation]
    assert [seen[:3] for seen in whole.seen] == expected
    assert resumed.seen == whole.seen[6:]
    assert resumed.model.hidden.kernel[...].is_fully_replicated == (devices == 1)
    assert len({loss for *_, loss in whole.seen}) > 8


def test_a_strategy_of_an_objective_is_tunix_own(guide):
    from tunix import DistillationTrainer, DistillationTrainingConfig
    from tunix.distillation.distillation_trainer import TrainingInput
    from tunix.distillation.strategies import LogitStrategy

    functions = {
        "student_forward_fn": guide.logits,
        "teacher_forward_fn": guide.logits,
        "labels_fn": lambda input_tokens, input_mask: jax.nn.one_hot(input_tokens, 16),
    }
    settings = {"temperature": guide.temperature, "alpha": guide.alpha}
    strategies = [
        guide.ObjectiveStrategy(guide.distillation, **functions),
        LogitStrategy(**functions, **settings),
    ]

    outputs = jnp.asarray(3 * REFERENCE[0]), jnp.asarray(3 * REFERENCE[1])
    labels = jax.nn.one_hot(TOKENS[0], 16)
    values = [
        jax.jit(jax.value_and_grad(lambda *x, s=strategy: s.compute_loss(*x)[0]))(*outputs, labels)
        for strategy in strategies
    ]
    np.testing.assert_allclose(*(value for value, _ in values), rtol=1e-6)
    np.testing.assert_allclose(*(slope for _, slope in values), rtol=1e-5, atol=1e-7)
    evaluated = [strategy.compute_eval_loss(outputs[0], labels)[0] for strategy in strategies]
    np.testing.assert_allclose(*evaluated, rtol=1e-6)

    batches = [TrainingInput(input_tokens=x, input_mask=np.ones_like(x)) for x in TOKENS[:3]]
    trained = []
    for strategy in strategies:
        student, teacher = guide.Model(nnx.Rngs(0)), guide.Model(nnx.Rngs(1))
        config = DistillationTrainingConfig(eval_every_n_steps=1, max_steps=3)
        made = DistillationTrainer(student, teacher, strategy, optax.sgd(0.5), config)
        made.train(batches)
        trained.append((nnx.state(student, nnx.Param), made.metrics_logger))
    losses = [logger.get_metric_history("", "loss", "train") for _, logger in trained]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(*losses, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *(x for x, _ in trained))


@pytest.mark.parametrize(
    ("estimator", "mode", "aggregation"),
    [
        ("k1", "kl", "sequence-mean-token-mean"),
        ("k2", "mse_kl", "token-mean"),
        ("k3", "low_var_kl", "sequence-mean-token-mean"),
    ],
)
def test_a_policy_loss_with_our_estimate_is_tunix_own(guide, estimator, mode, aggregation):
    from tunix import GRPOConfig
    from tunix.rl.common import TrainExample
    from tunix.rl.function_registry import get_policy_loss_fn

    config = GRPOConfig(
        policy_loss_fn="grpo_k2", beta=0.3, kl_loss_mode=mode, loss_agg_mode=aggregation
    )
    config.temperature = 0.7
    ours, theirs = get_policy_loss_fn(config.policy_loss_fn), get_policy_loss_fn("grpo")
    assert ours is guide.policy_loss

    prompts, completions = np.maximum(TOKENS[0], 1), np.maximum(TOKENS[1], 1)
    completions[0, 3:] = 0
    completions[1] = 0
    old, reference = (RNG.normal(-3, 0.5, completions.shape).astype(np.float32) for _ in range(2))
    example = TrainExample(
        prompt_ids=prompts,
        prompt_mask=prompts > 0,
        completion_ids=completions,
        completion_mask=(completions > 0).astype(np.int32),
        advantages=np.array([1.0, -0.5, -1.5, 0.3], np.float32),
        ref_per_token_logps=reference,
        old_per_token_logps=old,
    )

    @nnx.jit
    def evaluate(model):
        options = {"algo_config": config, "pad_id": 0, "eos_id": 15}
        losses = partial(ours, estimator=estimator, **options), partial(theirs, **options)
        return [nnx.value_and_grad(loss, has_aux=True)(model, example) for loss in losses]

    ((value, metrics), slope), ((expected, their_metrics), their_slope) = evaluate(
        guide.Model(nnx.Rngs(0))
    )
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name in metrics:
        np.testing.assert_allclose(metrics[name], their_metrics[name], rtol=1e-6)
    assert 0 < metrics["pg_clipfrac"] < 1
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), slope, their_slope)


@pytest.mark.parametrize(
    ("mode", "ours", "norm"),
    [
        ("token-mean", {"sequences": "tokens"}, None),
        ("sequence-mean-token-mean", {}, None),
        ("sequence-mean-token-scale", {"length": 6}, None),
        ("sequence-mean-token-scale", {"length": 4.5}, 4.5),
        ("seq-mean-token-sum", {"tokens": "sum"}, None),
        ("sequence-mean-token-sum-norm", {"tokens": "sum"}, None),
        ("sequence-mean-token-sum-norm", {"tokens": "sum", "normalizer": 4.5}, 4.5),
    ],
)
@pytest.mark.parametrize("batch", ["full", "with an empty sequence", "empty"])
def test_aggregate_is_tunix_own(mode, ours, norm, batch):
    """In all of its modes; value and gradient, in half precision too."""
    from tunix.rl.common import aggregate_loss

    mask = np.arange(6) < RNG.integers(1, 6, (4, 1))
    mask[2:] &= batch == "full"
    mask &= batch != "empty"
    kwargs = {} if norm is None else {"norm": norm}
    for dtype in (jnp.float32, jnp.bfloat16):
        values = jnp.asarray(RNG.normal(size=(4, 6)), dtype)
        (value, slope), (expected, their_slope) = (
            jax.value_and_grad(average)(values)
            for average in (
                lambda x: pj.aggregate(x, where=mask, **ours),
                lambda x: aggregate_loss(x, mask.astype(np.int32), mode, **kwargs),
            )
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-7)
        precision = 1e-6 if dtype == jnp.float32 else 1e-2
        np.testing.assert_allclose(
            np.float32(slope), np.float32(their_slope), rtol=precision, atol=1e-7
        )


def test_aggregate_knows_every_mode_of_tunix():
    from tunix.rl.common import aggregate_loss

    with pytest.raises(ValueError, match="Supported modes") as error:
        aggregate_loss(jnp.ones((1, 2)), jnp.ones((1, 2)), "other")
    modes = set(re.findall(r"'([a-z-]+)'", str(error.value)))
    assert len(modes) == 5
    assert {mode for mode in modes if f"| {mode} |" in pj.aggregate.__doc__} == modes

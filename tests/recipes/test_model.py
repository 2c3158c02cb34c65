"""Fine-tuning of a pretrained model of tokens: `penalties-jax finetune --model`."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from penalties_jax.recipes import llama
from penalties_jax.recipes.cli import main
from penalties_jax.recipes.finetune.kinds import Tokens
from penalties_jax.recipes.finetune.sweep import evaluate, start_sweep, sweep_step
from penalties_jax.recipes.text import Batches
from penalties_jax.recipes.training import compile_chunk
from tests.recipes.logs import read_log
from tests.recipes.models import CONFIG, TOKENS, make_weights, write_folder

WEIGHTS = (0.0, 0.5, 5.0)
WINDOWS = jnp.arange(36).reshape(4, 9) * 7 % len(TOKENS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def adapted(folder):
    return llama.with_adapters(llama.load(folder).model, 2, rngs=nnx.Rngs(0))


def trained(adapted, weights):
    """After one step of gradient descent by 1: each member's adapters less its gradient."""
    optimizer = optax.sgd(1.0)
    text = Batches(jnp.arange(300) * 11 % len(TOKENS), jax.random.key(0))
    state, shared = start_sweep(Tokens(), adapted, weights, text, optimizer=optimizer)
    chunk = compile_chunk(sweep_step(optimizer, batch_size=2, length=9))
    return state, *chunk(state, shared, 0, 1), shared


@pytest.fixture(scope="module")
def step(adapted):
    return trained(adapted, WEIGHTS)


def losses_from_logits(model, base, windows):
    log_p, log_q = (jax.nn.log_softmax(each(windows[:, :-1])) for each in (model, base))
    labels = windows[:, 1:, None]
    kl = jnp.mean(jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1))
    return -jnp.mean(jnp.take_along_axis(log_p, labels, -1)), kl


@pytest.mark.slow
def test_a_step_is_the_gradient_of_the_loss_from_logits(adapted, step):
    before, after, metrics, shared = step
    windows = shared.batches(jnp.int32(0), 2, 9)
    graph, adapters, rest = nnx.split(adapted, nnx.LoRAParam, ...)

    @jax.jit
    @jax.grad
    def gradient(adapters, weight):
        model, base = nnx.merge(graph, adapters, rest), nnx.merge(graph, shared.start, rest)
        loss, kl = losses_from_logits(model, base, windows)
        return loss + weight * kl

    for i, weight in enumerate(WEIGHTS):
        steps = jax.tree.map(
            lambda new, old, i=i: old[i] - new[i],
            after.members.parameters,
            before.members.parameters,
        )
        expected = gradient(adapters, weight)
        assert any(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(expected))
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-6), steps, expected
        )
    assert set(metrics) == {"loss", "kl", "kl/weighted", "total"}
    np.testing.assert_allclose(metrics["kl"], 0, atol=1e-7)


@pytest.mark.slow
def test_scores_are_those_from_logits(adapted, step):
    _, after, _, shared = step
    scores = evaluate(after.members, shared, WINDOWS)
    for i in range(len(WEIGHTS)):
        adapters = jax.tree.map(lambda leaf, i=i: leaf[i], after.members.parameters)
        member = shared.with_adapters(adapters)
        loss, kl = losses_from_logits(member, adapted, WINDOWS)
        np.testing.assert_allclose(scores.loss[i], loss, rtol=1e-5)
        np.testing.assert_allclose(scores.kl[i], kl, rtol=1e-3)
        base_loss, _ = losses_from_logits(adapted, adapted, WINDOWS)
        np.testing.assert_allclose(scores.base_loss[i], base_loss, rtol=1e-5)


TINY = {
    "steps": 5, "log-every": 2, "context": 8, "batch-size": 2, "rank": 2,
    "evaluation-windows": 4, "prompt-tokens": 3, "learning-rate": 0.01,
}  # fmt: skip


def command(folder, out, **options):
    words = [f"--{name}={value}" for name, value in (TINY | options).items()]
    return ["finetune", "--model", str(folder), "--out", str(out), *words]


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    for name, sentence in (("base", "the 12 then the he. "), ("target", "he 121 the hehe the! ")):
        (folder / name).write_text(sentence * 60)
    return [f"--{name}-text={folder / name}" for name in ("base", "target")]


@pytest.fixture(scope="module")
def run(folder, texts, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "run"
    main([*command(folder, out), "--kl-weights", "0", "1", *texts])
    return out


def test_everything_is_written(run):
    log = read_log(run)
    assert [line["step"] for line in log] == [2, 2, 4, 4, 5, 5, 5, 5]
    assert all(np.isfinite(list(line.values())[3:]).all() for line in log)
    before, after = (log[-2][f"target_{when}"] for when in ("before", "after"))
    assert after < before
    page = (run / "report.html").read_text()
    assert "nats per token" in page
    assert "After “The capital of France is”" in page
    assert page.count("<td>before</td>") == 3
    assert "Gradient norms" not in page
    assert not (run / "pretrained").exists()
    settings = (run / "config.yaml").read_text()
    assert "sha256" in settings


def test_resuming_gives_the_same_bits_and_other_weights_are_refused(
    run, folder, texts, tmp_path, capsys
):
    copy, weights = tmp_path / "run", ["--kl-weights", "0", "1", *texts]
    shutil.copytree(run, copy)
    lines = (run / "metrics.jsonl").read_text()
    newest = max((copy / "checkpoints").iterdir(), key=lambda path: int(path.stem.split("-")[0]))
    newest.unlink()
    main([*command(folder, copy), *weights, "--resume"])
    assert (copy / "metrics.jsonl").read_text() == lines
    weights_of_another = {key: 2 * array for key, array in make_weights(CONFIG).items()}
    other = write_folder(tmp_path / "other", weights=weights_of_another)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*command(other, copy), *weights, "--resume"])
    [line] = capsys.readouterr().err.splitlines()
    assert "can't resume" in line
    assert "--model" in line
    moved = shutil.copytree(folder, tmp_path / "moved")
    main([*command(moved, copy), *weights, "--resume"])


def test_budgets_hold_for_tokens_too(folder, texts, tmp_path):
    main([*command(folder, tmp_path / "run"), "--kl-budget", "0.001", "10", *texts])
    tight, loose = read_log(tmp_path / "run")[-2:]
    assert tight["kl_weight"] > 0
    assert loose["kl_weight"] == 0
    assert tight["kl"] < loose["kl"]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("--width 32", "--width has no meaning with --model"),
        ("--l1-weight 0.1", "--l1-weight has no meaning with --model"),
        ("--model nowhere", "nowhere"),
        ("--context 2000", "too short"),
        ("--batch-size 100000000", "of memory and there are"),
        ("--prompt-tokens 0", "--prompt-tokens must be"),
        ("--prompt-tokens 2000000000", "of memory and there are"),
        ("--budget-step-size 0.1", "--budget-step-size has no meaning without --kl-budget"),
        (f"--model {'x' * 5000}", "can't read"),
    ],
)
def test_bad_input_is_one_line(folder, texts, tmp_path, capsys, words, problem):
    with pytest.raises(SystemExit, match="2"):
        main([*command(folder, tmp_path / "run"), *texts, *words.split()])
    [line] = capsys.readouterr().err.splitlines()
    assert problem in line
    assert not (tmp_path / "run").exists()

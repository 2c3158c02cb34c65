import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml

import penalties_jax as pj
from penalties_jax.recipes.cli import main
from penalties_jax.recipes.decompose import DecomposeConfig, Result, sweep
from penalties_jax.recipes.decompose.components import (
    Site,
    clean_run,
    faithfulness,
    gates,
    losses,
    lower_leaky,
    masked_run,
    recovery,
    score,
    start,
    upper_leaky,
)
from penalties_jax.recipes.decompose.config import LP, SMOOTH_L0
from penalties_jax.recipes.decompose.results import IMAGES, frontier, matched
from penalties_jax.recipes.decompose.targets import ToyModel, train_toy_model
from penalties_jax.recipes.training import State
from tests.recipes.logs import read_log

SIZES = {"steps": 7, "log-every": 3, "seeds": 2, "components": 3}
LM_SIZES = {"batch-size": 2, "pretrain-steps": 4, "width": 8, "layers": 1, "heads": 2, "context": 8}


def arguments(target, **sizes):
    return [
        "decompose",
        f"--target={target}",
        *(f"--{name}={value}" for name, value in (SIZES | sizes).items()),
        *("--lp-coefficients", "0.001", "0.01"),
        *("--smooth-l0-coefficients", "0.002"),
    ]


TINY = arguments("lm", **LM_SIZES)


@pytest.fixture(scope="module")
def folders(run_and_kill):
    return run_and_kill(TINY)


@pytest.mark.slow
def test_everything_is_written(folders):
    folder, _ = folders
    assert {path.name for path in folder.iterdir()} == {
        *IMAGES, "report.html", "config.yaml", "metrics.jsonl", "checkpoints", "pretrained",
    }  # fmt: skip
    assert all(plot.stat().st_size < 200_000 for plot in folder.glob("*.png"))
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    assert (settings["steps"], settings["lp_coefficients"]) == (7, [0.001, 0.01])
    report = (folder / "report.html").read_text()
    assert len(re.findall("data:image/png;base64,", report)) == 3
    assert "://" not in report


@pytest.mark.slow
def test_log(folders):
    records = read_log(folders[0])
    train = [record for record in records if record["kind"] == "train"]
    assert {record["step"] for record in train} == {3, 6, 7}
    assert len(train) == 3 * 6
    names = {"loss", "faithfulness", "importance/dead", "importance/ci_l0_0.1"}
    # Each member logs both penalties, whichever it trains on.
    names |= {f"importance/{name}{part}" for name in (LP, SMOOTH_L0) for part in ("", "_no_beta")}
    for record in train:
        assert all(np.isfinite(record[name]) for name in names)
    evaluation = [record for record in records if record["kind"] == "evaluation"]
    assert [(r["penalty"], r["coefficient"], r["seed"]) for r in evaluation] == [
        (LP, 0.001, 0), (LP, 0.001, 1), (LP, 0.01, 0), (LP, 0.01, 1),
        (SMOOTH_L0, 0.002, 0), (SMOOTH_L0, 0.002, 1),
    ]  # fmt: skip
    for record in evaluation:
        assert 0 <= record["l0"] <= 3
        assert record["distance"] >= 0
        assert record["adversarial"] >= 0


@pytest.mark.slow
def test_an_interrupted_run_continues_to_the_same_end(folders):
    folder, killed = folders
    main([*TINY, "--out", str(killed), "--resume"])
    assert read_log(killed) == read_log(folder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--target", "cnn"], "target"),
        (["--lp-coefficients", "0"], "--lp-coefficients must be a finite number above 0"),
        (["--smooth-l0-coefficients", "1", "1"], "--smooth-l0-coefficients needs at least one"),
        (["--seeds", "0"], "--seeds must be a finite number above 0"),
        (["--beta", "-1"], "--beta must be a finite number 0 or above"),
        (["--width", "15"], "multiple of --heads"),
        (["--text", "/no/such/file"], "can't read"),
        (["--resume"], "nothing to resume"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main(["decompose", *options, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_one_and_four_devices_agree(tmp_path):
    """The batch is that of all devices: losses and metrics are the same over 50 steps."""
    sizes = {"steps": 50, "log-every": 10, "batch-size": 64, "components": 8, "seeds": 1}
    logs = []
    for devices in (1, 4):
        subprocess.run(
            [
                *(sys.executable, "-m", "penalties_jax.recipes.cli"),
                *arguments("tms", **sizes),
                *("--out", str(tmp_path / str(devices))),
            ],
            env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
            check=True,
            capture_output=True,
        )
        logs.append([r for r in read_log(tmp_path / str(devices)) if r["kind"] == "train"])
    assert len(logs[0]) == len(logs[1]) == 5 * 3
    for one, four in zip(*logs, strict=True):
        for name, value in one.items():
            if not isinstance(value, str):
                assert four[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


# The parts.


@pytest.fixture(scope="module")
def toy():
    weight = jnp.array([[1.0, 0.2], [-0.3, 0.8], [0.5, -0.6]])
    return ToyModel(weight=weight, bias=jnp.array([0.1, -0.1, 0.0]), probability=0.5)


@pytest.fixture(scope="module")
def sites(toy):
    return jax.jit(lambda key: start(key, toy, 5))(jax.random.key(0))


def test_components_start_out_faithful(toy, sites):
    assert float(faithfulness(sites, toy)) < 1e-3
    for name, weight in toy.weights.items():
        np.testing.assert_allclose(sites[name].v @ sites[name].u, weight, atol=0.1)


def test_masks_of_ones_leave_the_network_as_it_is(toy, sites):
    x = toy.sample(jax.random.key(1), 16)
    clean, seen = clean_run(toy, x)
    np.testing.assert_allclose(
        clean, jax.nn.relu(x @ toy.weight @ toy.weight.T + toy.bias), rtol=1e-5, atol=1e-6
    )
    ones = {name: jnp.ones((16, 5)) for name in sites}
    rest = {name: jnp.ones(16) for name in sites}
    np.testing.assert_allclose(masked_run(toy, sites, x, ones, rest), clean, atol=1e-5)
    # Without the rest, W is what the components add up to; without components there is no W.
    none = {name: jnp.zeros(16) for name in sites}
    summed = jax.nn.relu(
        x @ (sites["encode"].v @ sites["encode"].u) @ (sites["decode"].v @ sites["decode"].u)
        + toy.bias
    )
    np.testing.assert_allclose(masked_run(toy, sites, x, ones, none), summed, atol=1e-5)
    nothing = {name: jnp.zeros((16, 5)) for name in sites}
    np.testing.assert_allclose(
        masked_run(toy, sites, x, nothing, none), jnp.broadcast_to(jax.nn.relu(toy.bias), (16, 3))
    )
    assert seen["encode"].shape == (16, 3)
    assert seen["decode"].shape == (16, 2)


def test_importances_are_of_each_component_alone(toy, sites):
    """The network of component j sees v_j . x and nothing else."""
    _, seen = clean_run(toy, toy.sample(jax.random.key(2), 7))
    site = sites["encode"]
    by_hand = np.empty((7, 5))
    for j in range(5):
        inner = np.asarray(seen["encode"] @ site.v[:, j])
        hidden = jax.nn.gelu(inner[:, None] * site.gate_in[j] + site.gate_bias[j])
        by_hand[:, j] = hidden @ site.gate_out[j] + site.gate_offset[j]
    np.testing.assert_allclose(gates(sites, seen)["encode"], by_hand, rtol=1e-4, atol=1e-5)


def test_leaky_hard_sigmoids():
    x = jnp.array([-2.0, 0.5, 3.0])
    assert lower_leaky(x).tolist() == [0, 0.5, 1]
    np.testing.assert_allclose(upper_leaky(x), [0, 0.5, 1.02])
    for sign, below in ((1.0, 0.0), (-1.0, -0.01)):
        _, pull = jax.vjp(lower_leaky, x)
        np.testing.assert_allclose(pull(jnp.full(3, sign))[0], [below, sign, 0])
    np.testing.assert_allclose(jax.grad(lambda x: upper_leaky(x).sum())(x), [0, 1, 0.01])


def test_losses_and_scores(toy, sites):
    x = toy.sample(jax.random.key(3), 64)
    parts = losses(jax.random.key(4), toy, sites, x)
    assert float(parts.faithfulness) == pytest.approx(float(faithfulness(sites, toy)))
    assert {name: c.shape for name, c in parts.importances.items()} == {
        "encode": (64, 5), "decode": (64, 5),
    }  # fmt: skip
    scores = score(jax.random.key(5), toy, sites, x, threshold=0.1)
    _, seen = clean_run(toy, x)
    g = {name: np.clip(raw, 0, 1) for name, raw in gates(sites, seen).items()}
    l0 = np.mean([(c > 0.1).sum(1).mean() for c in g.values()])
    assert float(scores.l0) == pytest.approx(l0)
    random = parts.reconstruction
    assert float(scores.adversarial) > float(random)


def test_recovery_is_one_for_the_true_components(toy):
    """One component for each feature: its row of W."""
    gate = jnp.zeros((3, 2))
    true = {"encode": Site(jnp.eye(3), toy.weight, gate, gate, gate, jnp.zeros(3))}
    assert float(recovery(toy, true)) == pytest.approx(1, rel=1e-6)
    mixed = {"encode": Site(jnp.ones((3, 1)), jnp.ones((1, 2)), gate, gate, gate, jnp.zeros(1))}
    assert float(recovery(toy, mixed)) < 0.7


@pytest.mark.slow
def test_the_toy_model_learns():
    target = train_toy_model(features=3, hidden=2, probability=0.1, steps=2_000)
    x = target.sample(jax.random.key(0), 4096)
    clean, _ = clean_run(target, x)
    assert float(target.distance(clean, x)) < 0.4 * float(jnp.mean(x**2))
    assert float((x > 0).mean()) == pytest.approx(0.1, abs=0.02)


@pytest.mark.slow
def test_a_sweep_gives_the_numbers_of_single_runs(toy):
    config = DecomposeConfig(
        target="tms", steps=5, components=4, batch_size=16, seeds=1, faithfulness_weight=1.0,
        lp_coefficients=(0.01, 0.1), smooth_l0_coefficients=(0.02,),
    )  # fmt: skip
    optimizer = optax.adam(1e-2)
    step = jax.jit(sweep.sweep_step(config, optimizer))
    plain = sweep.penalties(config)
    penalties = {
        LP: pj.stack([c * plain[LP] for c in (0.01, 0.1)]),
        SMOOTH_L0: pj.stack([0.02 * plain[SMOOTH_L0]]),
    }
    keys = jnp.stack([jax.random.key(i) for i in range(3)])
    sites = jax.vmap(lambda key: start(key, toy, 4))(keys)
    shared = sweep.Shared(toy, penalties, keys, jax.random.key(9))
    state = State(sites, jax.vmap(optimizer.init)(sites))
    for index in range(5):
        state, _ = step(state, shared, index)
    for i, penalty in enumerate((0.01 * plain[LP], 0.1 * plain[LP], 0.02 * plain[SMOOTH_L0])):
        own = jax.tree.map(lambda x, i=i: x[i], sites)
        moments = optimizer.init(own)

        @jax.jit
        def single(own, moments, index, i=i, penalty=penalty):
            inputs = toy.sample(jax.random.fold_in(shared.key, index), 16)

            def total(own):
                parts = losses(jax.random.fold_in(keys[i], index), toy, own, inputs)
                weighted = parts.faithfulness + parts.reconstruction
                return weighted + penalty.at(index)(parts.importances)

            updates, moments = optimizer.update(jax.grad(total)(own), moments, own)
            return jax.tree.map(jnp.add, own, updates), moments

        for index in range(5):
            own, moments = single(own, moments, index)
        for alone, swept in zip(
            jax.tree.leaves(own), jax.tree.leaves(state.parameters), strict=True
        ):
            np.testing.assert_allclose(swept[i], alone, rtol=1e-4, atol=1e-5)


def test_frontiers_at_matched_l0():
    def result(penalty, coefficient, seed, l0, distance):
        return Result(penalty, coefficient, seed, l0, distance, 1.0, 0.0, None)

    results = [
        result(LP, 1.0, 0, 4.0, 0.1), result(LP, 1.0, 1, 6.0, 0.1), result(LP, 2.0, 0, 1.0, 1.0),
        result(SMOOTH_L0, 1.0, 0, 3.0, 0.2), result(SMOOTH_L0, 2.0, 0, 2.0, 0.4),
    ]  # fmt: skip
    assert frontier(results, LP, "distance") == [[(4.0, 0.1), (6.0, 0.1)], [(1.0, 1.0)]]
    rows = matched(results, "distance", count=3)
    assert [row[0] for row in rows] == [2.0, 2.5, 3.0]
    np.testing.assert_allclose([row[1] for row in rows], 10 ** -np.array([0.25, 0.375, 0.5]))
    np.testing.assert_allclose([row[2] for row in rows], [0.4, 0.08**0.5, 0.2])
    assert matched(results[:3] + results[4:], "distance") == []

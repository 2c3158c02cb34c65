import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, Mesh

from penalties_jax.recipes import training
from penalties_jax.recipes.runs import Run
from penalties_jax.recipes.stopping import StoppedError, stoppable
from penalties_jax.recipes.training import adam, compile_chunk, train
from tests.recipes.logs import read_log

MESH = Mesh(jax.devices()[:1], ("data",), axis_types=(AxisType.Auto,))
MEMBERS = [{"name": "a"}, {"name": "b"}]


def step(state, data, index):
    """Adds 1 to both members; the loss of each is infinite or NaN from its own step on."""
    fails = index >= data
    return state + 1, {"loss": jnp.where(fails, jnp.array([jnp.inf, jnp.nan]), state)}


def trained(folder, *, fails=(100, 100), steps=7):
    return train(
        Run(folder, {}),
        step,
        jnp.zeros(2),
        jnp.array(fails),
        mesh=MESH,
        steps=steps,
        every=3,
        members=MEMBERS,
    )


def test_chunks_of_any_length_are_one_program_with_mean_metrics():
    chunk = compile_chunk(lambda state, data, index: (state + data, {"loss": state, "at": index}))
    state = jnp.float32(0)
    for first, last, loss, at in ((3, 5, 1, 3.5), (5, 10, 8, 7), (10, 12, 15, 10.5)):
        state, means = chunk(state, jnp.float32(2), first, last)
        assert (float(means["loss"]), float(means["at"])) == (loss, at)
    assert float(state) == 18
    assert chunk._cache_size() == 1


def test_training_logs_and_saves_at_multiples_and_at_the_end(tmp_path):
    end = trained(tmp_path)
    assert (end.step, end.state.tolist(), end.diverged) == (7, [7, 7], {})
    assert [(r["step"], r["name"], r["loss"]) for r in read_log(tmp_path)] == [
        (at, name, loss) for at, loss in ((3, 1), (6, 4), (7, 6)) for name in "ab"
    ]
    assert end.log.records == read_log(tmp_path)


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    end = trained(tmp_path)
    monkeypatch.setattr(training, "compile_chunk", lambda step: pytest.fail)
    again = trained(tmp_path)
    assert again.state.tolist() == end.state.tolist()
    assert again.log.records == end.log.records


def test_a_member_that_diverges_has_no_more_lines_and_the_others_go_on(tmp_path, capsys):
    end = trained(tmp_path, fails=(100, 4))
    assert (end.step, end.diverged) == (7, {1: 6})
    assert [(r["step"], r["name"], r["loss"]) for r in read_log(tmp_path)] == [
        (3, "a", 1), (3, "b", 1), (6, "a", 4), (6, "b", None), (7, "a", 6),
    ]  # fmt: skip
    told = "penalties-jax: train, name b: diverged, no finite loss by step 6"
    assert [line for line in capsys.readouterr().err.splitlines() if "diverged" in line] == [told]
    assert trained(tmp_path, fails=(100, 4)).diverged == {1: 6}


def test_a_total_that_is_no_finite_number_is_a_divergence_too(tmp_path):
    def overflows(state, data, index):
        return state, {"loss": jnp.ones(1), "total": jnp.where(index < 4, 1, jnp.inf)[None]}

    settings = {"mesh": MESH, "steps": 9, "every": 3, "members": [{}]}
    end = train(Run(tmp_path, {}), overflows, jnp.zeros(1), jnp.zeros(1), **settings)
    assert (end.step, end.diverged) == (6, {0: 6})


def test_without_a_member_left_training_ends(tmp_path):
    end = trained(tmp_path, fails=(4, 1))
    assert (end.step, end.diverged) == (6, {0: 6, 1: 3})
    assert read_log(tmp_path)[-1]["step"] == 6
    assert trained(tmp_path, fails=(4, 1)).diverged == end.diverged


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_once_the_chunk_is_saved(tmp_path, monkeypatch, number):
    whole = trained(tmp_path / "whole")

    def with_signal(step):
        chunk = compile_chunk(step)

        def called(state, data, first, last):
            if first == 3:
                signal.raise_signal(number)
            return chunk(state, data, first, last)

        return called

    with monkeypatch.context() as patch:
        patch.setattr(training, "compile_chunk", with_signal)
        with stoppable(), pytest.raises(StoppedError, match=number.name) as stopped:
            trained(tmp_path / "run")
    assert stopped.value.number == number
    assert {record["step"] for record in read_log(tmp_path / "run")} == {3, 6}
    resumed = trained(tmp_path / "run")
    assert resumed.state.tolist() == whole.state.tolist()
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def test_a_second_signal_is_heard_while_a_program_runs():
    program = """
import jax, os, signal, threading, time
from penalties_jax.recipes.stopping import stoppable
jnp = jax.numpy
loop = jax.jit(lambda x: jax.lax.fori_loop(0, 2**31 - 1, lambda i, x: jnp.sin(x), x))
long = loop.lower(1.0).compile()
def ask():
    for _ in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
with stoppable():
    threading.Thread(target=ask).start()
    long(1.0).block_until_ready()
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == 143


def test_handlers_are_those_of_before_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stoppable():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize(("second", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_second_signal_ends_at_once(second, code):
    program = f"""
import signal
import time
from penalties_jax.recipes.runs import Run
from penalties_jax.recipes.stopping import stoppable
with stoppable():
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.{second})
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_adam_trains_from_one_step_up():
    for steps in (1, 10):
        optimizer = adam(0.1, steps)
        value = jnp.float32(1)
        state = optimizer.init(value)
        for _ in range(steps):
            updates, state = optimizer.update(2 * value, state, value)
            value = optax.apply_updates(value, updates)
        assert value < 0.95

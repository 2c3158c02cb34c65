import dataclasses
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from penalties_jax.recipes.devices import choose_mesh, connect, make_mesh, split_over_devices
from penalties_jax.recipes.options import Options, UsageError
from tests.recipes.logs import read_log

EIGHT = pytest.mark.skipif(jax.device_count() != 8, reason="of eight devices")


def chosen(mesh, batch_size):
    return choose_mesh(Options(mesh=mesh), batch_size).mesh


@EIGHT
def test_the_devices_are_those_asked_for_or_all_that_divide_the_batch():
    assert chosen(None, 16) == "data=8"
    assert chosen(None, 4) == "data=1"
    assert chosen("data=2", 4) == "data=2"
    assert make_mesh(Options(mesh="data=2")).shape == {"data": 2}
    assert make_mesh(Options()).shape == {"data": 1}


@pytest.mark.parametrize(
    "mesh", ["2", "data", "data=", "data=x", "data=-1", "model=2", "data=1,", ""]
)
def test_what_is_no_mesh_is_refused(mesh):
    with pytest.raises(UsageError, match="--mesh must be data=N"):
        chosen(mesh, 4)


@EIGHT
def test_a_mesh_that_cannot_be_is_refused():
    for mesh in ("data=0", "data=9", "data=999999999"):
        with pytest.raises(UsageError, match="not possible with 8 devices"):
            chosen(mesh, 4)
    with pytest.raises(UsageError, match="--batch-size 4 can't be split over 3 devices"):
        chosen("data=3", 4)


@EIGHT
def test_a_batch_is_split_where_it_can_be():
    mesh = make_mesh(Options(mesh="data=4"))
    with jax.set_mesh(mesh):
        placed = jax.jit(split_over_devices)(jnp.zeros((8, 3)))
        whole = jax.jit(split_over_devices)(jnp.zeros((6, 3)))
    assert placed.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("data")), 2)
    assert whole.shape == (6, 3)
    assert split_over_devices(jnp.zeros((8, 3))).shape == (8, 3)


@pytest.mark.parametrize("missing", ["JAX_NUM_PROCESSES", "JAX_PROCESS_ID"])
def test_an_incomplete_environment_is_one_line(monkeypatch, missing):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.setenv(missing, "two")
    with pytest.raises(UsageError, match=f"need a number in {missing}, not 'two'"):
        connect()


@pytest.mark.parametrize(
    "environment",
    [
        {"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "nowhere", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "5"},
        {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "9" * 20, "JAX_PROCESS_ID": "0"},
        {"SLURM_STEP_NUM_TASKS": "many"},
        {"OMPI_COMM_WORLD_SIZE": ""},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
def test_an_environment_that_tells_nonsense_is_one_line(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError):
        connect()


# Whole runs: processes that share the batches of a run.


def started(arguments, devices, **environment):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, "-m", "penalties_jax.recipes.cli", *arguments],
        env=os.environ | {"XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_in_two_processes(arguments, other=()):
    """Output, errors and exit code of each; the second one is given other words besides."""
    address = f"localhost:{free_port()}"
    processes = [
        started(
            [*arguments, *(other if number else ())],
            devices=2,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(number),
            JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
        )
        for number in range(2)
    ]
    return [(*process.communicate(timeout=600), process.returncode) for process in processes]


SMALL = {
    "finetune": (
        "--batch-size=4 --rank=2 --pretrain-steps=8 --pretrain-batch-size=4 --evaluation-windows=4 "
        "--width=16 --layers=1 --heads=2 --context=16 --kl-weights 0 1"
    ),
    "sparsify": (
        "--batch-size=4 --pretrain-steps=8 --evaluation-windows=4 --width=16 --layers=1 --heads=2 "
        "--context=16 --targets 0.5"
    ),
    "decompose": (
        "--batch-size=4 --pretrain-steps=8 --width=8 --layers=1 --heads=2 --context=8 "
        "--components=3 --lp-coefficients 0.001 --smooth-l0-coefficients 0.001"
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("job", SMALL)
def test_two_processes_of_two_devices_do_what_one_does(tmp_path, job):
    """Losses and metrics over 50 steps."""
    arguments = [job, *SMALL[job].split(), "--steps=50", "--log-every=25"]
    alone = started([*arguments, "--mesh=data=1", f"--out={tmp_path / 'one'}"], devices=1)
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    main, other = run_in_two_processes([*arguments, f"--out={tmp_path / 'two'}"])
    assert (main[2], other[2]) == (0, 0), (main, other)
    assert "report:" in main[0]
    assert "report:" not in other[0]
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    assert len(one) == len(two) > 0
    for ours, theirs in zip(one, two, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            # The excess is a small difference of losses.
            absolute = 1e-5 * ours["loss"] if name == "excess" else 1e-8
            exact = value is None or isinstance(value, str)
            expected = value if exact else pytest.approx(value, rel=1e-5, abs=absolute)
            assert theirs[name] == expected, name


@pytest.mark.slow
def test_what_is_refused_is_refused_once(tmp_path):
    (tmp_path / "report.html").touch()
    main, other = run_in_two_processes(
        ["finetune", *SMALL["finetune"].split(), f"--out={tmp_path}"]
    )
    assert (main[2], other[2]) == (2, 2)
    assert "not from a run of this kind" in main[1].splitlines()[-1]
    assert "not from a run of this kind" not in other[1]


@pytest.mark.slow
def test_processes_that_differ_are_refused(tmp_path):
    arguments = ["finetune", *SMALL["finetune"].split(), f"--out={tmp_path / 'run'}"]
    main, other = run_in_two_processes(arguments, ["--seed=1"])
    assert (main[2], other[2]) == (2, 2)
    assert "the processes differ in their options" in main[1].splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_the_mesh_is_a_setting(tmp_path):
    assert dataclasses.asdict(choose_mesh(Options(mesh="data=1"), 3))["mesh"] == "data=1"

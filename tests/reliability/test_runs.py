"""Runs that are killed, stopped, starved of disk or damaged go on to the very same end."""

import functools
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.reliability.attacks import HARD, SEEDS

SIZES = "--width=16 --layers=1 --heads=2 --context=16 --batch-size=2 --pretrain-steps=6"
OPTIONS = {
    "finetune": "--rank=2 --kl-weights 0 1 --evaluation-windows=4 --pretrain-batch-size=2",
    "sparsify": "--targets 0.5 --evaluation-windows=4",
    "decompose": "--components=3 --lp-coefficients 0.001 --smooth-l0-coefficients 0.001",
}

pytestmark = pytest.mark.slow

# Each takes two processes, of seconds each: for every commit the first job is tried twice.
ATTEMPTS = [
    (job, seed) for job in OPTIONS for seed in (SEEDS if HARD or job == "finetune" else SEEDS[:1])
]
attempts = pytest.mark.parametrize(("job", "seed"), ATTEMPTS)
an_attempt = pytest.mark.parametrize(("job", "seed"), ATTEMPTS if HARD else ATTEMPTS[:1])

# Enough checkpoints that a kill finds one half written.
STEPS = "--steps=30 --log-every=1"
LONGEST = 600


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs, which the many runs share."""
    folder = tmp_path_factory.getbasetemp().parent / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


PROGRAM = """
import resource, sys
if largest_file := sys.argv.pop(1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest_file),) * 2)
from penalties_jax.recipes.cli import main
main()
"""


class Runs:
    """Starts a job in a folder, as a process of its own."""

    def __init__(self, job, cache, folder):
        self.job, self.cache, self.folder = job, cache, folder

    def start(self, largest_file=None):
        resume = ["--resume"] if (self.folder / "config.yaml").exists() else []
        return subprocess.Popen(
            [
                *(sys.executable, "-c", PROGRAM, str(largest_file or ""), self.job, *resume),
                *f"{SIZES} {OPTIONS[self.job]} {STEPS} --out={self.folder}".split(),
            ],
            env=os.environ
            | {
                "XLA_FLAGS": "--xla_force_host_platform_device_count=1",
                "JAX_COMPILATION_CACHE_DIR": str(self.cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self, process):
        """The exit code, and the lines that it told."""
        _, errors = process.communicate(timeout=LONGEST)
        assert "Traceback" not in errors, errors
        lines = errors.replace("\r", "\n").splitlines()
        return process.returncode, [line for line in lines if line.startswith("penalties-jax: ")]

    def finish(self):
        """Resume, or start where there is nothing to resume, up to the end."""
        code, lines = self.wait(self.start())
        assert code == 0, lines
        return lines

    def begun(self, process):
        """Wait until the run has its folder: from here on it is stopped, not only killed."""
        deadline = time.monotonic() + LONGEST
        while not (self.folder / "config.yaml").exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def trained(self, process):
        """Wait until a checkpoint is there."""
        while not list(self.folder.glob("checkpoints/*.npz")) and process.poll() is None:
            time.sleep(0.02)


@pytest.fixture(scope="module")
def whole(cache, tmp_path_factory):
    """What a job comes to undisturbed, and the seconds that this takes."""

    @functools.cache
    def run(job):
        runs = Runs(job, cache, tmp_path_factory.mktemp(job))
        runs.finish()
        shutil.rmtree(runs.folder)
        start = time.monotonic()
        runs.finish()
        return contents(runs), time.monotonic() - start

    return run


@pytest.fixture
def runs(job, cache, tmp_path, whole):
    """The runs of a job in a folder of the test's own, when all is compiled."""
    whole(job)
    return Runs(job, cache, tmp_path / "run")


def contents(runs):
    """What a run ends with: its log and its last checkpoints, which name their bytes."""
    checkpoints = sorted(path.name for path in runs.folder.glob("checkpoints/*"))
    return (runs.folder / "metrics.jsonl").read_bytes(), checkpoints


@attempts
def test_killed(runs, job, seed, whole):
    """At any time, up to three times in a row."""
    draw = random.Random(f"{job} {seed}")
    expected, seconds = whole(job)
    for _ in range(draw.randint(1, 3)):
        process = runs.start()
        try:
            process.wait(draw.uniform(0.2, 1.0) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
        process.communicate()
    runs.finish()
    assert contents(runs) == expected


@attempts
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped(runs, job, seed, number, whole):
    draw = random.Random(f"{job} {seed} {number}")
    expected, seconds = whole(job)
    process = runs.start()
    runs.begun(process)
    try:
        process.wait(draw.uniform(0, 0.6) * seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    code, lines = runs.wait(process)
    if code:
        assert code == 128 + number
        assert lines == [f"penalties-jax: stopped by {number.name}; --resume continues this run"]
    runs.finish()
    assert contents(runs) == expected


@attempts
def test_a_full_disk(runs, job, seed, whole):
    """No file may be larger than some size, as where a quota ends."""
    draw = random.Random(f"{job} {seed}")
    expected, _ = whole(job)
    limit = int(2 ** draw.uniform(7, 16))
    code, [line] = runs.wait(runs.start(largest_file=limit))
    assert code in (1, 2)
    assert "File too large" in line
    runs.finish()
    assert contents(runs) == expected


@an_attempt
def test_a_folder_that_goes_away(runs, job, seed, whole):
    draw = random.Random(f"{job} {seed}")
    expected, _ = whole(job)
    process = runs.start()
    runs.trained(process)
    time.sleep(draw.uniform(0, 0.3))
    runs.folder.rename(runs.folder.with_name("elsewhere"))
    code, lines = runs.wait(process)
    assert code == 1, lines
    [line] = lines
    assert "No such file or directory" in line
    runs.folder.with_name("elsewhere").rename(runs.folder)
    runs.finish()
    assert contents(runs) == expected


def cut(data, draw):
    """Shorter, or as long and something else."""
    shorter = [data[:0], data[: len(data) // 2], data[:-1]]
    return draw.choice([*shorter, draw.randbytes(len(data))])


def flipped(data, draw):
    bit = draw.randrange(8 * len(data))
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.fixture(scope="module")
def interrupted(cache, tmp_path_factory, whole):
    """The folder of a run that was stopped on its way."""

    @functools.cache
    def run(job):
        whole(job)
        runs = Runs(job, cache, tmp_path_factory.mktemp(job) / "run")
        process = runs.start()
        runs.trained(process)
        process.terminate()
        assert runs.wait(process)[0] == 143
        return runs.folder

    return run


@attempts
@pytest.mark.parametrize("damage", [flipped, cut])
def test_damaged(runs, job, seed, damage, whole, interrupted):
    """Any file of a run: what was computed again or earlier is the same, and it is said."""
    draw = random.Random(f"{job} {seed} {damage.__name__}")
    shutil.copytree(interrupted(job), runs.folder)
    files = sorted(
        path for path in runs.folder.rglob("*") if path.is_file() and path.stat().st_size
    )
    path = draw.choice([path for path in files if path.name not in ("config.yaml", ".lock")])
    path.write_bytes(damage(path.read_bytes(), draw))
    lines = runs.finish()
    assert contents(runs) == whole(job)[0]
    used = path.parent == runs.folder or path == max(
        path.parent.glob("*.npz"), key=lambda path: int(path.name.split("-")[0]), default=None
    )
    if used:
        assert any(path.name in line for line in lines), lines


@an_attempt
def test_damaged_settings(runs, job, seed, interrupted):
    """A run whose settings can't be told is refused, and stays as it is."""
    draw = random.Random(f"{job} {seed}")
    shutil.copytree(interrupted(job), runs.folder)
    path = runs.folder / "config.yaml"
    path.write_bytes(draw.randbytes(len(path.read_bytes())))
    code, [line] = runs.wait(runs.start())
    assert code == 2
    assert "not from a run of this kind" in line

"""Whole runs are tiny here, and most of their time is XLA's optimisation passes: done without."""

import shutil

import jax
import pytest

from penalties_jax.recipes.cli import main
from penalties_jax.recipes.runs import Log


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def run_and_kill(tmp_path_factory):
    """Run the command to its end; keep its folder as it was between logging step 6 and saving."""

    def run(arguments):
        folder, killed = tmp_path_factory.mktemp("run") / "out", tmp_path_factory.mktemp("killed")
        append = Log.append

        def copy_at_step_6(log, records):
            append(log, records)
            if log.path.parent == folder and log.records[-1]["step"] == 6:
                shutil.copytree(folder, killed, dirs_exist_ok=True)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Log, "append", copy_at_step_6)
            main([*arguments, "--out", str(folder)])
        return folder, killed

    return run

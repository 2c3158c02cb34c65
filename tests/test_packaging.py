"""What is shipped: a wheel and an sdist that an empty environment installs."""

import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from datetime import date
from email import message_from_bytes
from pathlib import Path

import pytest
import yaml

import penalties_jax as pj

ROOT = Path(__file__).parent.parent


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is built from it."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT))
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_wheel_holds_the_package_alone(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = message_from_bytes(
            archive.read(next(name for name in names if name.endswith("METADATA")))
        )
    assert wheel.stat().st_size < 500_000
    assert {"penalties_jax/py.typed", "penalties_jax/recipes/report.html.jinja"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"penalties_jax"}
    assert metadata["Version"] == pj.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = {line.partition(">")[0] for line in required}
    assert names == {"jax", "jaxlib", "flax", "optax", "numpy", "jaxtyping"}


def test_sdist_holds_what_the_tests_need(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "Makefile", "constraints.txt", "conftest.py"} <= names
    assert {"tests/test_packaging.py", "docs/index.md", "mkdocs.yml", ".ci/run"} <= names
    assert {"CHANGELOG.md", "CONTRIBUTING.md", ".pre-commit-config.yaml"} <= names
    assert {"notebooks/01_penalties_by_eye.ipynb", "benchmarks/README.md"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith("runs")]


def test_metadata_passes_twine(built):
    run(sys.executable, "-m", "twine", "check", "--strict", *map(str, built))


def test_version_is_that_of_the_newest_release_in_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    entries = re.findall("^## (?!Unreleased$)(.*)$", changelog, re.MULTILINE)
    versions, dates = zip(*(entry.split(" - ") for entry in entries), strict=True)
    assert versions[0] == pj.__version__
    assert list(dates) == sorted(map(str, map(date.fromisoformat, dates)), reverse=True)


def test_a_commit_runs_the_linters_of_make_lint():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = [hook["entry"] for hook in repository["hooks"]]
    recipe = (ROOT / "Makefile").read_text().replace("$(LINT)", ".venv-lint")
    assert hooks == re.findall(
        r"^\t(\.venv-lint/bin/(?:ruff|basedpyright).*)$", recipe, re.MULTILINE
    )


INSTALLED = """
import pathlib
import sys
import jax.numpy as jnp
import penalties_jax as pj

assert "flax" not in sys.modules
folder = pathlib.Path(pj.__file__).parent
assert folder.is_relative_to(sys.prefix), folder
assert (folder / "py.typed").exists()
assert pj.l1(jnp.array([-1.0, 2.0])) == 3.0
assert pj.nnx.Loss and pj.linen.Loss and pj.adapters.datum
print("installed")
"""


@pytest.mark.slow
def test_installs_into_an_empty_environment(built, tmp_path):
    """The wheel, and with it the sdist that it was built from."""
    wheel, _ = built
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    run(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", wheel)
    assert run(python, "-c", INSTALLED, cwd=tmp_path).strip() == "installed"

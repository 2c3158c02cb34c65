import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from penalties_jax.recipes import doctor
from penalties_jax.recipes.cli import main


def test_ten_lines_for_a_bug_report(capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS_OF_A_TEST", "a\nb")
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    report = dict(line.split(maxsplit=1) for line in lines)
    for package in ("jax", "jaxlib", "flax", "optax", "numpy"):
        assert f"{package} {doctor.version(package)}" in report["packages"]
    assert report["python"].startswith(sys.version.split()[0])
    assert "x cpu" in report["devices"]
    assert "GB" in report["platform"]
    assert report["dtypes"] == "float32 by default"
    assert "jax_enable_x64=False, jax_default_matmul_precision=None" in report["config"]
    assert r"JAX_PLATFORMS_OF_A_TEST='a\nb'" in report["environment"]
    assert "XLA_FLAGS=" in report["environment"]
    assert report["verdict"].startswith("ok: value and gradient of 12 compiled functions")
    assert all(name in report["errors"] for name in doctor.CHECKS)


@jax.custom_jvp
def wrong_slope(x):
    return x**2


wrong_slope.defjvp(lambda x, t: (x[0] ** 2, 2.001 * x[0] * t[0]))

WRONG = {
    "value": doctor.Check(lambda x: 1.001 * x**2, lambda x: x**2),
    "sign of one": doctor.Check(lambda x: x.at[0, 0].multiply(-1), lambda x: x),
    "gradient": doctor.Check(wrong_slope, lambda x: x**2),
    "nan": doctor.Check(lambda x: x * jnp.nan, lambda x: x),
    "raises": doctor.Check(lambda x: x @ x, lambda x: x),
}


def test_what_is_wrong_is_named(capsys, monkeypatch):
    right = {"right": doctor.Check(lambda x: x**2, lambda x: x**2)}
    monkeypatch.setattr(doctor, "CHECKS", right | WRONG)
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    assert stop.value.code == 1
    output = capsys.readouterr().out
    assert len(output.splitlines()) == 10
    assert f"FAILED: {', '.join(WRONG)}" in output
    assert "raises TypeError: " in output


def test_a_machine_without_a_device(capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("no cuda\nhere")

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setattr(doctor, "CHECKS", {"absent": doctor.Check(fail, lambda x: x)})
    with pytest.raises(SystemExit):
        main(["doctor"])
    assert "none: RuntimeError: no cuda here" in capsys.readouterr().out


def test_differences_are_gradients():
    x = np.linspace(0.5, 2, 6).reshape(2, 3)
    found = doctor._gradient(lambda x: np.sum(x**3 + np.sin(x)), x)
    np.testing.assert_allclose(found, 3 * x**2 + np.cos(x), rtol=1e-9)

import base64
import math
from typing import NamedTuple

import pytest

from penalties_jax.recipes import plots
from penalties_jax.recipes.options import RunError
from penalties_jax.recipes.report import Report, format_table, likely_cause, write_results
from penalties_jax.recipes.runs import Log, Run
from penalties_jax.recipes.training import Trained
from tests.recipes.logs import read_log

PNG = b"\x89PNG\r\n\x1a\n"
VALUES = {"unit": "byte", "unigram": 1.0, "norms": ((), []), "written": []}


class Result(NamedTuple):
    weight: float


def test_results_are_logged_written_and_printed(tmp_path, capsys):
    run = Run(tmp_path, {"steps": 7, "text": "a <b> & c"})
    report = Report(
        template="finetune/report.html.jinja",
        table=(("name", "value"), [("x<y", "1")]),
        units="nats",
        images={"adaptation.png": PNG, "curves.png": PNG + b"2"},
        values=VALUES | {"unigram": 1.234, "norms": (("norm",), [("5",)])},
    )
    trained = Trained(None, 7, Log(tmp_path), {})
    write_results(run, trained, [Result(0.5)], report, "")
    assert read_log(tmp_path) == [{"kind": "evaluation", "step": 7, "weight": 0.5}]
    assert (tmp_path / "curves.png").read_bytes() == PNG + b"2"
    html = (tmp_path / "report.html").read_text()
    assert "<title>Fine-tuning under a KL penalty</title>" in html
    assert "<h1>Fine-tuning under a KL penalty</h1>" in html
    assert "frequencies of bytes alone score\n1.23 on" in html
    assert "<td>x&lt;y</td>" in html
    assert "<td>a &lt;b&gt; &amp; c</td>" in html
    for png in report.images.values():
        assert f"data:image/png;base64,{base64.b64encode(png).decode()}" in html
    *table, last = capsys.readouterr().out.splitlines()
    assert table == format_table(*report.table).splitlines()
    assert last == f"nats; report: {tmp_path / 'report.html'}"


@pytest.fixture
def diverged(tmp_path):
    """Writes the results of three members, of which some have diverged."""
    run = Run(tmp_path, {"steps": 7})
    report = Report(
        template="finetune/report.html.jinja",
        table=(("name",), [("a",), ("b",), ("c",)]),
        units="nats",
        images={"adaptation.png": PNG, "curves.png": PNG},
        values=VALUES,
    )

    def write(steps):
        trained = Trained(None, 6, Log(tmp_path), steps)
        results = [Result(math.nan if i in steps else 0.5) for i in range(3)]
        write_results(run, trained, results, report, "lower --learning-rate")

    return write


def test_who_has_diverged_is_said_everywhere(diverged, tmp_path, capsys):
    diverged({1: 3})
    assert read_log(tmp_path) == [
        {"kind": "evaluation", "step": 6, "weight": 0.5},
        {"kind": "evaluation", "step": 6, "weight": None, "diverged": 3},
        {"kind": "evaluation", "step": 6, "weight": 0.5},
    ]
    printed = capsys.readouterr()
    assert [line.split() for line in printed.out.splitlines()[2:5]] == [
        ["a"], ["b", "by", "step", "3"], ["c"],
    ]  # fmt: skip
    advice = "1 of 3 members diverged: lower --learning-rate"
    assert printed.err == f"penalties-jax: {advice}\n"
    html = (tmp_path / "report.html").read_text()
    assert advice in html
    assert "<td>by step 3</td>" in html


def test_a_run_of_which_all_members_have_diverged_has_failed(diverged, tmp_path):
    with pytest.raises(RunError, match="3 of 3 members diverged: lower --learning-rate"):
        diverged({0: 3, 1: 6, 2: 6})
    assert "3 of 3 members diverged" in (tmp_path / "report.html").read_text()


class Choices(NamedTuple):
    learning_rate: float = 1e-3
    kl_weights: tuple[float, ...] = (0.0, 0.1, 1.0)
    entropy_weight: float = 0.0


@pytest.mark.parametrize(
    ("chosen", "diverged", "option"),
    [
        (Choices(), {0, 1, 2}, "learning-rate"),
        (Choices(learning_rate=1.0), {0, 1, 2}, "learning-rate"),
        (Choices(learning_rate=1.0), {0, 1}, "learning-rate"),
        (Choices(entropy_weight=1e6), {0, 1, 2}, "entropy-weight"),
        (Choices(entropy_weight=1e6, learning_rate=2e-3), {0, 2}, "entropy-weight"),
        (Choices(kl_weights=(0.0, 0.1, 1e9)), {0, 1, 2}, "kl-weights"),
        (Choices(), {2}, "kl-weights"),
        (Choices(learning_rate=1.0), {1, 2}, "kl-weights"),
    ],
)
def test_the_likely_cause(chosen, diverged, option):
    swept = [{"kl_weights": weight} for weight in chosen.kl_weights]
    names = Choices._fields
    assert likely_cause(chosen, Choices(), names, swept, diverged) == f"lower --{option}"


def test_table_is_aligned_right():
    assert format_table(("a", "long"), [("10", "1"), ("2", "3")]).splitlines() == [
        " a  long",
        "--  ----",
        "10     1",
        " 2     3",
    ]


def test_plots_are_small_pngs():
    frontier = plots.frontier([0.1, 0.2], [0.3, 0.1], labels=["0", "1"], axes=("x", "y"))
    records = [{"step": step, "w": w, "loss": step * w} for step in (1, 2) for w in (0.5, 1.0)]
    curves = plots.curves(records, panels={"loss": "loss, nats"}, by="w", legend="weight")
    for png in (frontier, curves):
        assert png.startswith(PNG)
        assert len(png) < 200_000


def test_limits_are_lines_that_leave_the_curves_in_view(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "_png", lambda figure: drawn.append(figure) or b"")
    records = [{"step": step, "w": w, "kl": 0.1 * step} for step in (1, 2) for w in (0.15, 9.0)]
    panels = {"kl": "KL", "step": "step"}
    plots.curves(records, panels=panels, by="w", legend="w", limited="kl")
    limited, other = drawn[0].axes
    heights = [line.get_ydata()[0] for line in limited.lines if line.get_linestyle() == "--"]
    assert heights == [0.15, 9.0]
    assert len(other.lines) == 2
    assert limited.get_ylim() == pytest.approx((0.1, 0.2), abs=0.02)
    assert limited.get_xlim() == pytest.approx((1, 2), abs=0.2)

import base64
from typing import NamedTuple

from penalties_jax.recipes import plots
from penalties_jax.recipes.report import Report, format_table, write_results
from penalties_jax.recipes.runs import Run, read_log

PNG = b"\x89PNG\r\n\x1a\n"


class Result(NamedTuple):
    weight: float


def test_results_are_logged_written_and_printed(tmp_path, capsys):
    run = Run(tmp_path, {"steps": 7, "text": "a <b> & c"})
    report = Report(
        template="finetune/report.html.jinja",
        table=(("name", "value"), [("x<y", "1")]),
        units="nats",
        images={"adaptation.png": PNG, "curves.png": PNG + b"2"},
        values={"unigram": 1.234, "norms": (("norm",), [("5",)])},
    )
    write_results(run, [Result(0.5)], report)
    assert read_log(tmp_path) == [{"kind": "evaluation", "step": 7, "weight": 0.5}]
    assert (tmp_path / "curves.png").read_bytes() == PNG + b"2"
    html = (tmp_path / "report.html").read_text()
    assert "<title>Fine-tuning under a KL penalty</title>" in html
    assert "<h1>Fine-tuning under a KL penalty</h1>" in html
    assert "frequencies alone score 1.23 on" in html
    assert "<td>x&lt;y</td>" in html
    assert "<td>a &lt;b&gt; &amp; c</td>" in html
    for png in report.images.values():
        assert f"data:image/png;base64,{base64.b64encode(png).decode()}" in html
    *table, last = capsys.readouterr().out.splitlines()
    assert table == format_table(*report.table).splitlines()
    assert last == f"nats; report: {tmp_path / 'report.html'}"


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

import base64

from penalties_jax.recipes import plots
from penalties_jax.recipes.report import Section, format_table, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def test_report_holds_everything_and_escapes_text(tmp_path):
    write_report(
        tmp_path / "report.html",
        title="A <b> & c",
        sections=[
            Section("Numbers", "How to read", table=(("name", "value"), [("x<y", "1")])),
            Section("Picture", "What it shows", image=PNG),
        ],
    )
    html = (tmp_path / "report.html").read_text()
    assert "<h1>A &lt;b&gt; &amp; c</h1>" in html
    assert "<td>x&lt;y</td>" in html
    assert f"data:image/png;base64,{base64.b64encode(PNG).decode()}" in html


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

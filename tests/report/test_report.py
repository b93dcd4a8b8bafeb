"""`metablocks report`: what runs record, the page made of it, and the same figures as pictures."""

import json
import math
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import metablocks as mb
from metablocks.cli import main
from metablocks.report import commands, figures
from metablocks.report.interactive import plotly
from metablocks.runs import drawing, plots
from metablocks.runs.drawing import Figure, Line, Panel
from metablocks.runs.examples import read_test
from metablocks.runs.finished import read_run
from metablocks.runs.learned import learned
from tests.compare.made_up import finished_run

STREAM = [
    *("--set", "tasks={block: text, length: 8, shots: 2, queries: 2, chunks: 2}"),
    *("--set", "model={block: transformer, width: 8, heads: 1, layers: 2}"),
    *("--set", "inner.steps=2"),
]


class Tags(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html(folder):
    return (folder / "report.html").read_text()


@pytest.fixture(scope="module")
def charts(html):
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', html, re.S)
    return json.loads(text)


def test_the_page_loads_nothing_and_is_small(html):
    assert len(html.encode()) < commands.LARGEST
    page = Tags(html)
    for _, attributes in page.tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "data:").startswith("data:")
    assert not page.all("link")[1:]
    assert not re.search(r"@import|url\(|https?:", html)


def test_what_a_user_wrote_is_text(html, runs):
    page = Tags(html)
    name = read_run(runs["sinusoid"]).values["name"]
    assert {*"<>&$"} < {*name}
    assert name in page.text
    assert not page.all("b")
    assert len(page.all("script")) == 3
    assert name not in html


def test_every_chart_is_one_that_plotly_knows(html, charts):
    ids = {attributes.get("id") for _, attributes in Tags(html).tags}
    assert charts.keys() <= ids
    for chart in charts.values():
        go.Figure({"data": chart["data"], "layout": chart["layout"]})


def test_every_picture_is_there_twice(folder, charts):
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {path.stem for path in folder.glob("*.svg")}
    assert {
        *("accuracy-training", "mse-training", "1-tasks-seed0", "1-examples-seed0"),
        *("2-rates", "2-step_loss", "2-tasks-seed0", "2-tasks-seed1", "2-examples-seed0"),
        *("3-spectra-seed0", "3-costs", "1-adaptation-seed5"),
    } <= names
    assert "1-tasks-seed5" not in names
    assert "3-rates" not in names


def test_the_slider_has_the_rates_of_every_epoch(html, charts, runs):
    page = Tags(html)
    (slider,) = page.all("input")
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "2")
    (label,) = page.all("label")
    assert label["for"] == slider["id"]
    chart = charts[slider["id"].removesuffix("-slider")]
    assert list(chart["frames"]) == ["1", "2", "3"]
    assert [trace["name"] for trace in chart["data"] if trace["showlegend"]] == ["seed 0", "seed 1"]
    assert len({trace["line"]["color"] for trace in chart["data"][::2]}) == 2
    for place, name in enumerate(("strokes 0", "strokes 1")):
        learner = torch.load(runs[name] / "checkpoint.pt", weights_only=True)["learner"]
        rates = [r for key, r in learner.items() if key.startswith("rule.") and "rate." in key]
        drawn = [y for y in chart["frames"]["3"][2 * place] if y is not None]
        assert drawn == pytest.approx(torch.cat(rates).tolist(), rel=1e-3)
        assert chart["data"][2 * place]["y"] == chart["frames"]["3"][2 * place]


def test_negative_rates_are_marked():
    def row(epoch, *values, **more):
        return {"epoch": epoch, "rates": {"w": list(values), "b": [0.5, 0.5]}, **more}

    run = finished_run(
        metrics=[row(1, 0.1, 0.2), row(2, 0.1, -0.2, negative_rates={"w": [0, 1.0]})]
    )
    figure = figures.rates([run])
    line, marked = figure.panels[0].lines
    assert marked.label == "negative"
    assert [y for y in line.y if not math.isnan(y)] == [0.1, -0.2, 0.5, 0.5]
    assert [y for y in marked.y if not math.isnan(y)] == [-0.2]
    assert all(map(math.isnan, figure.panels[0].frames[1][1]))
    assert figures.rates([finished_run(metrics=[{"epoch": 1}])]) is None


def test_the_learned_rates_of_a_rule_of_ones_own_are_drawn():
    class LearnedRate(mb.UpdateRule):
        negates = True

        def setup(self, params, steps):
            rates = {name: torch.full_like(p, 0.5) for name, p in params.items()}
            self.rate = mb.NamedTensors(rates, learn=True)
            return self

        def forward(self, updates, state, step):
            return {name: -self.rate[name] * u for name, u in updates.items()}, state

    rule = mb.Chain(mb.ClipNorm(1.0), LearnedRate())
    model, loss = torch.nn.Linear(1, 1), torch.nn.functional.mse_loss
    learner = mb.MetaLearner(model, loss=loss, steps=2, rule=rule)
    row = {"epoch": 1, **learned(learner, 0)}
    assert row["rates"] == {"weight": [0.5], "bias": [0.5]}
    (panel,) = figures.rates([finished_run(metrics=[row])]).panels
    assert panel.lines[0].y == [0.5, 0.5]


def test_weights_of_steps_are_drawn_where_more_than_the_last_counts(charts, html):
    labels = [[trace["name"] for trace in chart["data"]] for chart in charts.values()]
    assert labels.count(["after step 1", "after step 2"]) == 1
    assert Tags(html).text.count("weights of the steps' query losses") == 1


def test_steps_of_one_weight_are_named_by_their_ends():
    even = [{"epoch": epoch, "step_loss": [0.1] * 4 + [0.5, 0.1]} for epoch in (1, 2)]
    last = {"epoch": 1, "step_loss": [0.0, 0.0, 1.0]}
    figure = figures.step_losses(finished_run(metrics=even))
    labels = ["after step 0, 1, 2, 3, 5", "after step 4"]
    assert [line.label for line in figure.panels[0].lines] == labels
    figure = figures.step_losses(finished_run(metrics=[{"epoch": 1, "step_loss": [0.1] * 16}]))
    assert [line.label for line in figure.panels[0].lines] == ["after step 0 to 15"]
    assert figures.step_losses(finished_run(metrics=[last])) is None


def test_each_test_task_is_drawn_and_those_that_overshoot_are_counted(html, charts, runs):
    run, test = read_run(runs["strokes 0"]), read_test(runs["strokes 0"] / "test.npz")
    assert test["scores"].mean(0).tolist() == pytest.approx(run.test.mean, rel=1e-5)
    assert test["losses"].mean(0).tolist() == pytest.approx(run.test.loss, rel=1e-5)
    over = sum(task[-1] < max(task) for task in test["scores"].tolist())
    assert f"{over} of 7 tasks overshoot" in Tags(html).text
    panel = figures.tasks(run, test).panels[1]
    counts = {line.label: sum(map(math.isnan, line.y)) for line in panel.lines}
    assert counts.get("overshoot", 0) == over
    assert counts.get("others", 0) == 7 - over


def test_the_gallery_shows_what_was_predicted_and_the_worst_first(html, runs):
    test = read_test(runs["strokes 0"] / "test.npz")
    examples = list(test["example"].values())
    hits = [(each["prediction"] == each["query_y"]).mean() for each in examples]
    assert hits == sorted(hits)
    assert len({int(each["number"]) for each in examples}) == len(examples)
    for each, share in zip(examples, hits, strict=True):
        assert test["scores"][each["number"], -1] == pytest.approx(share)
        assert each["support"].dtype == each["query"].dtype == np.uint8
    kinds = [attributes["class"] for attributes in Tags(html).all("figure")]
    shown = [*examples, *read_test(runs["curvature"] / "test.npz")["example"].values()]
    right = sum(int((each["prediction"] == each["query_y"]).sum()) for each in shown)
    assert kinds.count("right") == right
    assert kinds.count("wrong") == sum(len(each["query_y"]) for each in shown) - right
    assert all(attributes["alt"] for attributes in Tags(html).all("img"))


def test_the_bits_per_byte_along_a_stream_are_drawn(short_run, tmp_path):
    path = short_run(["ttt_text", *STREAM], tmp_path)
    run, test = read_run(path), read_test(path / "test.npz")
    mean, each, *_ = figures.figures_of([run], [test])
    assert "bits per byte along a stream, 7 test tasks" in mean.title
    axes = "chunks of the stream before, an inner step each", "query bits per byte"
    assert [(panel.x, panel.y) for panel in (*mean.panels, *each.panels)] == [axes, axes]
    assert mean.panels[0].lines[0].y == pytest.approx(test["scores"].mean(0).tolist(), rel=1e-5)
    assert test["scores"].shape == (7, 3)  # streams of 3 chunks
    assert np.allclose(test["scores"] * math.log(2), test["losses"])
    recipe, batches = (
        (path / "recipe.yaml").read_text(),
        "  batches:\n    block: stream\n    query: true\n",
    )
    assert batches in recipe
    (path / "recipe.yaml").write_text(recipe.replace(batches, ""))  # of a version without the field
    assert plots.adaptation(read_run(path)).panels[0].x == "inner steps"


def test_fits_are_the_learners_before_and_after_each_step(runs):
    test = read_test(runs["sinusoid"] / "test.npz")
    for example in test["example"].values():
        losses = test["losses"][example["number"]]
        for fit, loss in zip(example["fits"], losses, strict=True):
            between = np.interp(example["query"], example["grid"], fit)
            assert ((between - example["query_y"]) ** 2).mean() == pytest.approx(loss, rel=0.05)


def test_spectra_are_those_of_the_best_checkpoint(runs):
    learner = torch.load(runs["curvature"] / "best.pt", weights_only=True)["learner"]
    spectra = read_test(runs["curvature"] / "test.npz")["spectrum"]
    assert set(spectra) == {"out", "in", "filter", "scale"}
    (factor,) = (f for key, f in learner.items() if key.endswith("factors.in.head.weight"))
    expected = torch.linalg.svdvals(factor).tolist()
    assert spectra["in"]["head.weight"].tolist() == pytest.approx(expected, rel=1e-5)


def test_the_recipe_is_there_with_the_origin_of_each_value(html, runs):
    page = Tags(html)
    origins = json.loads((runs["strokes 1"] / "run.json").read_text())["origins"]
    assert origins["outer.epochs"] == "--set"
    assert re.fullmatch(r".*maml_pp_strokes.yaml:\d+", origins["outer.estimator.block"])
    assert "inner.rule[0].init" in page.text
    assert origins["outer.estimator.block"] in page.text
    assert "is older" in page.text


def test_runs_of_one_problem_get_the_table_of_compare(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(drawing, "save", lambda *_: None)
    chosen = [str(runs[name]) for name in ("strokes 0", "strokes 1")]
    assert main(["report", *chosen, "--out", str(tmp_path)]) == 0
    (report,) = tmp_path.glob("*/report.html")
    text = Tags(report.read_text()).text
    assert "SD over seeds" in text
    assert "higher is better" in text


def test_other_problems_are_said_not_to_compare(html):
    assert "No table: maml_sinusoid and maml_pp_strokes are not about the same tasks" in html


@pytest.mark.parametrize(
    ("damage", "status", "message"),
    [
        (lambda run: (run / "metrics.jsonl").write_text(""), 2, "is not finished"),
        (lambda run: (run / "test.npz").write_bytes(b"PK"), 1, "test.npz: not readable"),
        (lambda run: (run / "recipe.yaml").unlink(), 2, "it is not the folder of a run"),
    ],
)
def test_a_run_that_cannot_be_reported_is_named(damage, status, message, runs, tmp_path, capsys):
    run = Path(shutil.copytree(runs["sinusoid"], tmp_path / "run"))
    damage(run)
    assert main(["report", str(run), "--out", str(tmp_path / "reports")]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("library", ["plotly.offline", "matplotlib"])
def test_without_a_library_it_is_said_how_to_get_it(library, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["report", str(runs["old"]), "--out", str(tmp_path / "reports")]) == 2
    assert "is not installed (pip install 'metablocks[plot]')" in capsys.readouterr().err
    assert not (tmp_path / "reports").exists()


def test_a_logarithmic_axis_is_labelled_1_2_5():
    panel = Panel("x", "y", [Line([0, 1, 2], [0.03, 0.0, 4.0])], log=True)
    axis = plotly(panel)["layout"]["yaxis"]
    assert axis["ticktext"] == ["0.02", "0.05", "0.1", "0.2", "0.5", "1", "2", "5"]
    assert axis["range"] == pytest.approx([math.log10(0.02), math.log10(5)])
    assert (
        "type"
        not in plotly(Panel("x", "y", [Line([0, 1], [3.0, 4.0])], log=True))["layout"]["yaxis"]
    )


def test_text_that_matplotlib_would_read_is_drawn_as_it_is(tmp_path):
    line = Line([0, 1], [1.0, 2.0], "_$a_b")
    drawing.save(Figure("odd", r"$\frac", [Panel("$x_", "y^$", [line], "$")]), tmp_path, ("svg",))
    assert (tmp_path / "odd.svg").stat().st_size > 1000

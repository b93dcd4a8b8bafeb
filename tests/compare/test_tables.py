"""Tables hold the numbers of their rows; means pool what the seeds say."""

import csv
import io
import sys

import pytest
import torch
from made_up import finished_run, row, row_of, score

from metablocks.compare import table
from metablocks.compare.jobs import cores
from metablocks.compare.notes import notes_on
from metablocks.compare.table import Row
from metablocks.runs import plots
from metablocks.runs.directory import RunDirectory
from metablocks.runs.scores import pool, pool_seeds

ROWS = [
    row("maml", 0.95123456, 0.004),
    row("fo|maml", 0.94, seconds=30.5, memory_beyond_start=None, seeds=(0,)),
    Row("wild", "Wild", (), 2),
]


def test_csv_has_every_number_in_full():
    read = list(csv.DictReader(io.StringIO(table.as_csv(ROWS))))
    assert [each["recipe"] for each in read] == ["maml", "fo|maml", "wild"]
    for each, given in zip(read[:2], ROWS[:2], strict=True):
        assert float(each["mean"]) == given.score.mean[-1]
        assert float(each["interval_95"]) == given.score.interval[-1]
        assert float(each["std_over_tasks"]) == given.score.std[-1]
        assert float(each["worst_decile"]) == given.score.worst_decile[-1]
        assert float(each["seconds"]) == given.seconds
        assert float(each["seconds_per_step"]) == given.seconds_per_step
        assert int(each["peak_memory_bytes"]) == given.peak_memory
        assert int(each["meta_steps"]) == given.meta_steps
        assert each["seeds"] == " ".join(map(str, given.seeds))
    assert float(read[1]["seconds_per_step_ratio"]) == pytest.approx(30.5 / 60, rel=1e-12)
    assert float(read[1]["difference"]) == pytest.approx(-0.01123456, rel=1e-9)
    assert read[1]["memory_beyond_start_bytes"] == ""
    assert (read[2]["mean"], read[2]["failed_runs"]) == ("", "2")


def test_markdown_has_the_numbers_rounded():
    lines = table.markdown(table.cells(ROWS)).replace(r"\|", "/").splitlines()
    header, rule, *body = [[c.strip() for c in line.strip("|").split("|")] for line in lines]
    assert all(set(cell) <= set(":-") for cell in rule)
    maml, fomaml, wild = (dict(zip(header, cells, strict=True)) for cells in body)
    assert maml["test accuracy"] == "95.12 ± 0.40 %"
    assert maml["worst decile"] == "50.00 %"
    assert maml["beside the first"] == "–"
    assert fomaml["recipe"] == "fo/maml"
    assert fomaml["beside the first"] == "-1.12 points"
    assert fomaml["time in all"] == "30.5 s (0.51×)"
    assert fomaml["time a step"] == "15.2 ms (0.51×)"
    assert maml["peak memory"] == "400 MiB (1.00×)"
    assert fomaml["beyond start"] == "–"
    assert wild["test accuracy"] == "failed"
    assert wild["failed runs"] == "2"
    assert "ensemble" not in header
    assert "SD over seeds" not in header


def test_an_ensemble_has_a_column_of_its_own():
    rows = [
        row("maml", 0.95),
        row("maml_pp", 0.96, ensemble=score(0.97, 0.003, members=[1, 2, 3, 4, 5])),
    ]
    header, maml, maml_pp = table.cells(rows)
    column = header.index("ensemble")
    assert (maml[column], maml_pp[column]) == ("–", "97.00 ± 0.30 % (5 checkpoints)")


def test_errors_compare_by_their_ratio():
    rows = [row("maml", 0.5, measure="mse"), row("fomaml", 0.25, measure="mse")]
    header, first, second = table.cells(rows)
    assert header[1:3] == ["test MSE", "beside the first"]
    assert (first[2], second[1], second[2]) == ("–", "0.2500 ± 0.0100", "0.50×")


def test_differences_are_paired_where_tasks_are_the_same():
    hard = torch.arange(40, dtype=torch.float64) / 64
    more = 1 / 64 + torch.tensor([1, -1]).double().repeat(20) / 128
    for measure, cell in (("accuracy", "+1.56 ± 0.25 points"), ("mse", "0.0156 ± 0.0025 (1.05×)")):
        rows = [row_of("a", hard, measure=measure), row_of("b", hard + more, measure=measure)]
        header, _, second = table.cells(rows)
        assert second[header.index("beside the first")] == cell
        first, second = csv.DictReader(io.StringIO(table.as_csv(rows)))
        assert (first["difference"], first["difference_paired"]) == ("0.0", "")
        assert float(second["difference"]) == pytest.approx(1 / 64)
        interval = 1.96 * float(more.std()) / 40**0.5
        assert float(second["difference_interval_95"]) == pytest.approx(interval)
        assert (second["difference_paired"], second["difference_std_over_seeds"]) == ("True", "")
    legend = table.legend(rows)
    assert legend.endswith("; beside the first: the difference, task by task")


def test_ratios_are_to_the_first_row_that_has_numbers():
    header, _, first, second = table.cells(
        [Row("wild", "Wild", (), 1), row("a", 0.9), row("b", 0.8)]
    )
    column = header.index("beside the first")
    assert (first[column], second[column]) == ("–", "-10.00 points")


def test_text_has_a_line_for_each_quantity_and_loses_nothing():
    cells = table.cells([row(name, 0.9) for name in ("one", "two", "three", "four")])
    lines = table.text(cells).splitlines()
    assert [line.split("  ")[0] for line in lines] == cells[0]
    assert all(cell in line for row in cells for cell, line in zip(row, lines, strict=True))


def test_pooled_scores_are_those_of_all_tasks_together():
    values = [torch.rand(30, 1, dtype=torch.float64), torch.rand(50, 1, dtype=torch.float64) + 1]
    pooled = pool_seeds([pool("test", "mse", each, each) for each in values])
    every = pool("test", "mse", torch.cat(values), torch.cat(values))
    assert pooled.tasks == 80
    for name in ("mean", "std", "interval", "loss"):
        assert getattr(pooled, name) == pytest.approx(getattr(every, name), rel=1e-12)
    means = torch.stack([each.mean() for each in values])
    assert pooled.seed_std == pytest.approx([float(means.std())], rel=1e-12)


def test_what_does_not_compare_is_said():
    alike = {"a": [finished_run()], "b": [finished_run()]}
    assert notes_on(alike, jobs=1) == []
    unlike = {
        "a": [finished_run(), finished_run(1)],
        "b": [finished_run(steps=30, record={"recipe": "x", "device": "cuda:0"})],
    }
    told = "\n".join(notes_on(unlike, jobs=2, load=cores() + 3.0))
    assert "meta-steps: a 20; b 30" in told
    assert "seeds differ, and with them the test tasks: a 0, 1; b 0" in told
    assert "the device: a cpu; b cuda:0; times and memory may not compare" in told
    assert "with 2 runs side by side" in told
    assert "busy with other work" in told


def test_runs_of_one_row_that_do_not_compare_are_said():
    elsewhere = finished_run(1, record={"recipe": "x", "device": "cuda:0"})
    (note,) = notes_on({"a": [finished_run(), elsewhere]}, jobs=1)
    assert note == "the device: a cpu, cuda:0; times and memory may not compare"


def test_the_transductive_convention_is_said():
    ours = finished_run(record={"device": "cpu", "transductive": True})
    plain = finished_run(record={"device": "cpu", "transductive": False})
    told = "transductive: batch norm uses the statistics of the query set it predicts on"
    assert notes_on({"a": [ours], "b": [ours]}, jobs=1) == [told]
    assert notes_on({"a": [ours], "b": [plain]}, jobs=1) == [f"{told} (in a)"]
    assert notes_on({"a": [plain]}, jobs=1) == []


def test_without_matplotlib_a_note_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for notes in (
        plots.draw_comparison(tmp_path, {"a": [finished_run()]}),
        plots.draw(RunDirectory(tmp_path)),
    ):
        assert len(notes) == 1
        assert "matplotlib is not installed (pip install 'metablocks[plot]')" in notes[0]
    assert list(tmp_path.iterdir()) == []


def test_how_a_worst_decile_is_pooled_is_said_where_it_is():
    def legend(*seeds):
        return table.legend([row("a", 0.9, seeds=seeds)])

    assert "worst decile" not in legend(0)
    assert legend(0, 1).endswith("worst decile: the mean of the seeds' own")


def test_an_ensemble_is_said_not_to_count():
    several = score(0.92, members=[1, 2, 3, 4, 5])
    (note,) = notes_on({"a": [finished_run(ensemble=several)]}, jobs=1)
    assert "ensemble: 5 checkpoints predict together" in note

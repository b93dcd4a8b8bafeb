"""Blocks that hold blocks, and sources of tasks of unequal size, in recipes."""

import pytest
import torch

from metablocks.errors import RecipeError
from metablocks.gradcheck.shrink import shrink
from metablocks.recipe import build, load
from metablocks.recipe.listing import json_schema
from metablocks.recipe.load import from_text
from metablocks.runs.trial import try_out
from metablocks.tasks import BySplit, Classes, Episodes, Mix
from tools.fuzzing.data import draw_folders, draw_tensors
from tools.fuzzing.small_images import draw_emnist

STROKES = "{block: strokes, ways: 3, shots: 1, queries: 2, size: 8}"
SMALL = ["model.layers=1", "inner.steps=1", "evaluation.inner_steps=1", "hardware.device=cpu"]


def test_a_mix_and_a_source_for_each_split_are_built_with_seed_and_device():
    mix = load("maml_strokes", [f"tasks={{block: mix, sources: [{STROKES}, {STROKES}]}}", "seed=7"])
    source = build(mix).source
    assert isinstance(source, Mix)
    assert [part.seed for part in source.sources] == [7, 7]
    assert from_text(mix.to_yaml()).hash == mix.hash
    splits = f"train: {STROKES}, validation: {STROKES}, test: {STROKES.replace('1', '4')}"
    source = build(load("maml_strokes", [f"tasks={{block: by_split, {splits}}}"])).source
    assert isinstance(source, BySplit)
    assert (source.train.shots, source.test.shots) == (1, 4)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            "{block: mix, sources: []}",
            r"tasks.sources: takes a list of blocks.* given an empty list",
        ),
        ("{block: mix, sources: strokes}", "tasks.sources: takes a list of blocks"),
        ("{block: mix, sources: [strok]}", r'sources\[0\].block: no tasks block.*"strokes"'),
        (
            f"{{block: mix, sources: [{STROKES[:-1]}, pens: 1}}]}}",
            r"sources\[0\].pens: unknown field",
        ),
        (
            f"{{block: mix, sources: [{STROKES}, sinusoid]}}",
            r"tasks.sources: Mix: kind of sources\[0\] is",
        ),
        (f"{{block: mix, sources: [{STROKES.replace('8', '4')}]}}", r"sources\[0\].size: takes"),
        ("{block: mix, sources: ['os:getcwd']}", r"sources\[0\].block: .*--allow os"),
        (
            f"{{block: by_split, train: {STROKES}, validation: x, test: x}}",
            "tasks.validation.block",
        ),
    ],
)
def test_what_a_held_block_lacks_has_its_place(tasks, message):
    with pytest.raises(RecipeError, match=message):
        load("maml_strokes", [f"tasks={tasks}"])


def test_tasks_of_unequal_size_run_in_the_loop_and_vmap_names_it(tmp_path):
    root = draw_folders(tmp_path / "root")
    tasks = (
        f"tasks={{block: folders, root: {root}, size: 8, ways: [2, 3], shots: [1, 2], queries: 2}}"
    )
    text = try_out(load("maml_strokes", [tasks, "hardware.executor={block: loop}", *SMALL]))
    assert "a meta-step on 2 tasks" in text
    small, _ = shrink(load("maml_strokes", [tasks]))  # as for check --gradients
    assert [small.at(f"tasks.{name}") for name in ("ways", "shots", "queries")] == [2, 1, 2]
    with pytest.raises(RecipeError, match=r"unequal size cannot be stacked.*executor=Loop\(\)"):
        try_out(load("maml_strokes", [tasks, *SMALL]))


def test_transforms_are_blocks_that_follow_one_another(tmp_path):
    root = draw_folders(tmp_path / "root")
    changed = (
        "support_transform: [{block: random_crop, size: 8, padding: 2}, random_horizontal_flip]"
    )
    tasks = f"{{block: folders, root: {root}, size: 8, ways: 3, shots: 1, queries: 2, {changed}}}"
    recipe = load("maml_strokes", [f"tasks={tasks}", *SMALL])
    assert from_text(recipe.to_yaml()).hash == recipe.hash
    crop, flip = build(recipe).source.support_transform
    assert (type(crop).__name__, crop.padding, flip.p) == ("RandomCrop", [2] * 4, 0.5)
    assert "a meta-step on 2 tasks" in try_out(recipe)


def test_data_sets_of_torchvision_and_files_of_tensors_are_sources(tmp_path):
    episodes = (
        f"{{block: episodes, datasets: {{block: emnist, folder: {draw_emnist(tmp_path)}}}, "
        "splits: [0.34, 0.33, 0.33], size: 8, ways: 3, shots: 1, queries: 2}"
    )
    torch.save(draw_tensors(), tmp_path / "tensors.pt")
    classes = f"{{block: classes, file: {tmp_path}/tensors.pt, ways: 3, shots: 1, queries: 2}}"
    for tasks, kind in ((episodes, Episodes), (classes, Classes)):
        recipe = load("maml_strokes", [f"tasks={tasks}", *SMALL])
        assert from_text(recipe.to_yaml()).hash == recipe.hash
        assert isinstance(build(recipe).source, kind)
        assert "a meta-step on 2 tasks" in try_out(recipe)


def test_transforms_and_data_sets_of_ones_own_are_held_if_they_are_allowed():
    tasks = (
        "{block: episodes, datasets: {block: 'outside_blocks:pairs', examples: 30}, ways: 2, shots: 1, "
        "queries: 2, splits: [0.34, 0.33, 0.33], query_transform: ['outside_blocks:brighter']}"
    )
    with pytest.raises(RecipeError, match="to run it, allow it: --allow outside_blocks"):
        load("maml_strokes", [f"tasks={tasks}"])
    source = build(load("maml_strokes", [f"tasks={tasks}"], allow=["outside_blocks"])).source
    task = source.sample("train", [0])
    assert torch.allclose(task.query[0] % 1, torch.tensor(0.1), atol=1e-5)
    assert not (task.support[0] % 1).any()


OWN = "{block: folders, root: ROOT, size: 8, ways: 3, shots: 1, queries: 2"


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            f"{OWN}, unlabelled: true}}",
            "tasks.unlabelled: Folders unlabelled .*give a support_transform",
        ),
        (f"{OWN}, query_transform: [crop]}}", r"query_transform\[0\].block: no transform block"),
        (f"{OWN}, query_transform: random_crop}}", "takes a list of blocks"),
        (f"{OWN}, query_transform: [random_crop]}}", r"transform\[0\].size: missing"),
        (f"{OWN}, query_transform: [{{block: random_grayscale, p: 2}}]}}", r"\[0\].p: takes"),
        (f"{OWN}, query_transform: ['os:getcwd']}}", r"query_transform\[0\].block: .*--allow os"),
        (
            "{block: episodes, datasets: {block: emnist, folder: /no}, ways: 2, shots: 1, queries: 1}",
            r"tasks.datasets.folder: EMNIST: .*has no folder EMNIST; torchvision.datasets.EMNIST",
        ),
        ("{block: classes, ways: 2, shots: 1, queries: 1}", "or else the file of one"),
    ],
)
def test_what_is_wrong_with_ones_own_data_has_its_place(tasks, message, tmp_path):
    root = draw_folders(tmp_path / "root")
    with pytest.raises(RecipeError, match=message):
        load("maml_strokes", [f"tasks={tasks.replace('ROOT', str(root))}"])


def test_editors_know_what_a_held_block_is():
    definitions = json_schema()["$defs"]["tasks"]["anyOf"]
    held = {
        entry["properties"]["block"]["const"]: entry["properties"]
        for entry in definitions
        if "const" in entry.get("properties", {}).get("block", {})
    }
    assert held["mix"]["sources"]["items"] == {"$ref": "#/$defs/tasks"}
    assert held["by_split"]["test"]["$ref"] == "#/$defs/tasks"

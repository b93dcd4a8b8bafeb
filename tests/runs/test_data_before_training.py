"""Data that cannot give the tasks of a run: one line before training begins, and no directory is left."""

import shutil

import pytest
from PIL import Image

from metablocks.cli import main
from tools.fuzzing.data import draw_folders

FOLDERS = (
    "tasks={{block: folders, root: {root}, size: 28, grey: true, ways: 2, shots: 1, queries: 2}}"
)
TINY = [
    *("--set", "outer.tasks_per_step=2"),
    *("--set", "outer.steps_per_epoch=1"),
    *("--set", "outer.epochs=1"),
    *("--set", "evaluation.tasks=2"),
    *("--device", "cpu"),
]


def no_validation(root):
    shutil.rmtree(root / "val")


def few_test_classes(root):
    for folder in sorted((root / "test").iterdir())[1:]:
        shutil.rmtree(folder)


def few_test_images(root):
    for file in sorted((root / "test" / "test ant").iterdir())[2:]:
        file.unlink()


def broken_test_image(root):
    file = root / "test" / "test ant" / "0.png"
    file.write_bytes(file.read_bytes()[:40])


def no_picture(root):
    Image.new("F", (4, 4)).save(root / "test" / "test ant" / "x.tif")


@pytest.mark.parametrize(
    ("damage", "options", "message"),
    [
        (
            no_validation,
            [],
            "tasks: Folders: there are no classes of validation; there are those of",
        ),
        (
            few_test_classes,
            [],
            "tasks: Folders ways is 2, and the classes of its splits are train 3",
        ),
        (few_test_images, [], "need 3 examples of every class, and test ant of test has 2"),
        (broken_test_image, [], "test ant/0.png: cannot be read as an image"),
        (no_picture, [], "test ant/x.tif: cannot be read as an image"),
        (
            lambda root: None,
            ["--set", "tasks.ways=[2, 3]"],
            "hardware.executor: vmap takes tasks of one size, and these are not; take the block loop",
        ),
    ],
)
def test_data_that_fails_is_found_before_training(
    damage, options, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, out = draw_folders(tmp_path / "root"), tmp_path / "runs"
    tasks = ["--set", FOLDERS.format(root=root), *options]
    run = ["run", "maml_strokes", *TINY, *tasks, "--out", str(out), "--quiet"]
    damage(root)
    assert main(run) == 2
    lines = capsys.readouterr().err.splitlines()
    assert message in lines[-1]
    assert not out.exists()
    if damage in (no_validation, few_test_classes, few_test_images):
        check = ["check", "maml_strokes", "--device", "cpu", *tasks]
        assert main(check) == 2
        assert message.removeprefix("tasks: ") in capsys.readouterr().err

"""The benchmark: its contenders compute one gradient, and its command says what it measured."""

import importlib
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.benchmarks import command, contenders, lineup, measure, report, worker
from tools.benchmarks.problem import build

ROOT = measure.ROOT
SETTINGS = measure.Settings("cpu", "float32", threads=1, rounds=1, quick=True, repeats=1)


@pytest.fixture(autouse=True)
def _quiet_imports():
    """The peers raise deprecation warnings of their own when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for peer in ("higher", "torchopt"):
            importlib.import_module(peer)
        yield


def bench(*argv, **environment):
    """`tools/bench` with the interpreter at hand in place of the checkout's own."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tools/benchmarks/main.py"), *argv],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize("name", [n for n in lineup.CONTENDERS if n != lineup.REFERENCE])
@pytest.mark.parametrize("case", lineup.CASES.values(), ids=lambda case: case.name)
def test_every_contender_has_the_plain_loops_gradient(case, name):
    # float64 rounding is 1e-16, over a few hundred operations in another order
    assert worker.gradient_error(name, case.quick()) < 1e-13


@pytest.mark.parametrize("name", lineup.CONTENDERS)
def test_a_second_run_gives_the_same_gradient(name):
    """No contender leaves the model adapted, or adds to what the run before it found."""
    run = getattr(contenders, name)(
        build(lineup.SINUSOID.quick(), device="cpu", dtype=torch.float64)
    )
    first, second = run(), run()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("case", ["sinusoid", "conv"])
def test_first_and_second_order_differ_so_that_the_check_can_tell_them_apart(case):
    second, first = (
        contenders.plain_loop(
            build(lineup.CASES[name].quick(), device="cpu", dtype=torch.float64)
        )()
        for name in (case, f"{case}-first-order")
    )
    error = max(float((second[key] - first[key]).norm()) for key in second)
    assert error > 1e3 * measure.TOLERANCE


def test_a_wrong_gradient_is_found_and_not_ranked(monkeypatch):
    right = contenders.higher
    monkeypatch.setattr(
        contenders,
        "higher",
        lambda problem: lambda: {name: 1.001 * g for name, g in right(problem)().items()},
    )
    error = worker.gradient_error("higher", lineup.SINUSOID.quick())
    assert error == pytest.approx(1e-3)
    scores = [
        measure.Score(lineup.CONTENDERS[name], [seconds], [2**20], error=error)
        for name, seconds, error in (("higher", 0.001, error), ("torchopt", 0.01, 0.0))
    ]
    assert report.fastest_peer(scores) is scores[1]
    text = report.section(lineup.SINUSOID, scores, SETTINGS)
    assert (
        "| higher | 1.00 ms | 1.00 ms – 1.00 ms | not ranked | 1.0 MiB | **wrong: 1.0e-03**" in text
    )
    assert "higher: not ranked; its gradient is off by 1.0e-03" in text


def test_nan_is_no_right_gradient():
    assert measure.Score(lineup.CONTENDERS["higher"], [1.0], [0], error=float("nan")).wrong


def test_the_ratio_is_to_the_fastest_peer_and_the_median_is_over_rounds():
    scores = [
        measure.Score(lineup.CONTENDERS[name], medians, [2**20], error=0.0)
        for name, medians in (
            ("plain_loop", [0.001] * 3),
            ("higher", [0.2] * 3),
            ("torchopt", [0.05, 0.1, 0.9]),
            ("metablocks_loop", [0.4] * 3),
            ("metablocks_vmap", [0.02] * 3),
        )
    ]
    text = report.section(lineup.SINUSOID, scores, SETTINGS)
    assert "| TorchOpt | 100.0 ms | 50.0 ms – 900.0 ms | 1.00× |" in text
    assert "Loop: 4.0× slower than the fastest of higher and TorchOpt (TorchOpt)." in text
    assert "Vmap: 5.0× faster than the fastest of higher and TorchOpt (TorchOpt)." in text


def test_quick_prints_the_run_the_table_and_the_sentence(tmp_path):
    out = tmp_path / "bench.md"
    chosen = [
        argument
        for name in ("plain_loop", "torchopt", "metablocks_vmap")
        for argument in ("--contender", name)
    ]
    done = bench("sinusoid", "--quick", *chosen, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert f"- command: `tools/bench sinusoid --quick {' '.join(chosen)}" in done.stdout
    assert f"torch {torch.__version__}" in done.stdout
    assert "threads: 1" in done.stdout
    for title, error in (
        ("plain loop", "reference"),
        ("TorchOpt", r"\S+e[+-]\d+"),
        ("metablocks Unrolled × Vmap", r"\S+e[+-]\d+"),
    ):
        row = rf"\| {title} \| [\d.]+ ms \| [\d.]+ ms – [\d.]+ ms \| [\d.]+× \| [\d.]+ MiB \| {error} \|"
        assert re.search(row, done.stdout), done.stdout
    sentence = r"Vmap: [\d.]+× (fast|slow)er than the fastest of higher and TorchOpt \(TorchOpt\)\."
    assert re.search(sentence, done.stdout)
    assert out.read_text(encoding="utf-8").split() == done.stdout.split()
    assert "Traceback" not in done.stderr


def test_a_contender_that_fails_stands_in_the_table_with_its_reason(tmp_path):
    (tmp_path / "higher.py").write_text("raise ModuleNotFoundError(name='higher')\n")
    (tmp_path / "torchopt.py").write_text("raise RuntimeError('a | b\\nmore')\n")
    done = bench(
        *("sinusoid", "--quick", "--contender", "higher", "--contender", "torchopt"),
        PYTHONPATH=os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])),
    )
    assert done.returncode == 0
    assert "| higher | failed: higher is not installed |" in done.stdout
    assert "| TorchOpt | failed: RuntimeError: a \\| b |" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_a_process_that_dies_is_a_reason_too(monkeypatch):
    monkeypatch.setattr(
        measure.subprocess,
        "run",
        lambda *args, **options: subprocess.CompletedProcess(args, -9, "", ""),
    )
    scores = measure.measure_case(lineup.SINUSOID.quick(), ["metablocks_vmap"], SETTINGS)
    assert scores[0].failure == "its process was ended by SIGKILL: out of memory?"
    assert not scores[0].ranked


def test_interrupting_ends_cleanly(monkeypatch, capsys):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure.subprocess, "run", interrupt)
    monkeypatch.setattr(command, "heading", lambda *args: "")
    assert command.main(["sinusoid", "--quick"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sinusiod"], 'no case is called "sinusiod"; did you mean "sinusoid"?'),
        (["xyz"], 'no case is called "xyz"; there are: sinusoid, '),
        (["--contender", "highre"], 'no contender is called "highre"; did you mean "higher"?'),
        (["--repeats", "0"], "takes an integer of at least 1, given 0"),
        (["--out", "nowhere/bench.md"], "there is no folder nowhere"),
    ],
)
def test_wrong_arguments_exit_with_2_and_a_reason(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main(argv)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_list_names_every_case_and_contender(capsys):
    assert command.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {n} ", printed, re.M) for n in [*lineup.CASES, *lineup.CONTENDERS])


def test_the_command_itself_imports_no_torch():
    """A worker's peak memory must not hold the memory of the process that started it."""
    code = "import sys; import tools.benchmarks.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

"""The benchmark: its contenders compute one gradient, and its command says what it measured."""

import dataclasses
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import warnings
from importlib.metadata import version

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import metablocks.executors.graphs
from tools.benchmarks import command, contenders, end_to_end, lineup, measure, report, worker
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


@pytest.fixture(autouse=True)
def _no_group():
    """A contender in processes makes this one a group, which its worker would end with."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def traced(monkeypatch):
    """Compiled contenders take their whole path, except that what is to be compiled runs as it is:
    real compiling takes a minute each. Yields the list of what was handed over."""
    handed = []

    def stand_in(graph, leaves):
        handed.append(graph)
        return lambda leaves: graph(*leaves)

    monkeypatch.setattr(metablocks.executors.graphs, "fused", stand_in)
    return handed


def request(name, case=lineup.SINUSOID, **changes):
    """What a worker is asked to do, at smoke sizes."""
    own = {"case": dataclasses.asdict(case.quick()), "contender": name, "device": "cpu"}
    own |= {"dtype": "float32", "threads": 1, "repeats": 1, "check": False}
    return {**own, "keep_freed_memory": False, "as_published": False, **changes}


def bench(*argv, **environment):
    """`tools/bench` with the interpreter at hand in place of the checkout's own."""
    return subprocess.run(
        [sys.executable, "-m", command.__name__, *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


@pytest.fixture
def twice(monkeypatch):
    """No contender leaves the model adapted, or adds to what the run before it found."""

    def make(contender, problem):
        run = contenders.make(contender, problem)

        def both():
            first, second = run(), run()
            assert all(torch.equal(first[key], second[key]) for key in first)
            return second

        return both

    monkeypatch.setattr(worker, "make", make)


EXACT = [
    name
    for name, contender in lineup.CONTENDERS.items()
    if name != lineup.REFERENCE and contender.role != "scale" and not contender.bfloat16
]


OF_EVERY_NET = ("metablocks_wideloop", "metablocks_adjoint_vmap")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        pytest.param(case, name, id=f"{case.name}-{name}")
        for case, name in itertools.product(lineup.CASES.values(), EXACT)
        # A trace is made by the same code in every case, and takes up to half a minute; a measured run
        # checks its own. So it does where the net or the number of tasks alone is another.
        if (not lineup.CONTENDERS[name].compile or case.name == "sinusoid")
        and (case.name not in ("conv-strided", "deep", "memory") or name in OF_EVERY_NET)
        and not case.whole  # "conv", as far as the gradient goes
        # The other sizes of this case are the same one at smoke sizes, and TorchOpt is left out.
        and not case.name.startswith("memory-lora-")
        and (case.name, name) != ("memory-lora", "torchopt")
    ],
)
def test_every_contender_has_the_plain_loops_gradient_twice(case, name, traced, twice):
    # float64 rounding is 1e-16, over a few hundred operations in another order
    assert worker.gradient_error(name, case.quick()) < 1e-13
    assert bool(traced) == (lineup.CONTENDERS[name].compile is True)


@pytest.mark.parametrize(
    "name", ["metablocks_wideloop_traced_bfloat16", "metablocks_loop_compiled_bfloat16"]
)
def test_bfloat16_is_measured_as_it_is_and_ranked_by_its_time(name, traced, twice):
    error = worker.gradient_error(name, lineup.CASES["conv-strided"].quick())
    assert 1e-4 < error < 0.3  # 8 bits of mantissa, two inner steps
    score = measure.Score(lineup.CONTENDERS[name], error=error)
    assert not score.wrong


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


def test_the_published_net_is_the_same_function_up_to_its_last_bit():
    ours, published = (
        build(lineup.CONV.quick(), device="cpu", dtype=torch.float64, as_published=flag)
        for flag in (False, True)
    )
    assert [*ours.model.body[0]._modules] != [*published.model.body[0]._modules]
    expected = contenders.plain_loop(ours)()
    actual = contenders.plain_loop(published)()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


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
    text = report.section(lineup.SINUSOID, scores, SETTINGS, {})
    assert (
        "| higher | 1.00 ms | 1.00 ms – 1.00 ms | not ranked | 1.0 MiB | – | – | **wrong: 1.0e-03**"
        in text
    )


def test_our_contenders_are_every_estimator_executor_and_compile():
    ours = [c for c in lineup.CONTENDERS.values() if c.role == "ours" and c.chunk is None]
    assert {(c.estimator, c.executor, c.compile) for c in ours} == set(
        itertools.product(("Unrolled", "Adjoint"), ("Loop", "Vmap"), (False, "trace", True))
    )
    assert {(c.estimator, c.compile) for c in ours if c.wide and not c.bfloat16} == set(
        itertools.product(("Unrolled", "Adjoint"), (False, "trace", True))
    )
    assert lineup.CONTENDERS["metablocks_adjoint_vmap_compiled"].title == (
        "metablocks Adjoint × Vmap, compiled"
    )


@pytest.mark.parametrize("name", ["metablocks_vmap_compiled", "metablocks_adjoint_loop_compiled"])
def test_the_first_call_of_a_compiled_contender_is_a_measurement_of_its_own(name, traced):
    result = worker.measure(request(name))
    assert traced
    assert result["first"] > 0
    assert result["compiling"] >= 0
    assert result["peak"] >= 0
    assert len(result["times"]) == 1
    assert "compiling" not in worker.measure(request(name.removesuffix("_compiled")))


def test_a_contender_that_falls_back_to_plain_code_is_no_compiled_measurement(monkeypatch, capsys):
    def refuse(graph, leaves):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(metablocks.executors.graphs, "fused", refuse)
    assert worker.main([json.dumps(request("metablocks_vmap_compiled"))]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {"failure": "not compiled, but run as it is: RuntimeError: no C++ compiler"}


def test_the_memory_of_tensors_is_counted_to_the_byte():
    start = torch.ones(100)  # 400 bytes
    kept = []

    def run():
        first = start.neg()
        second = first.neg()
        del first
        kept.append(second.neg())  # in the place of the first

    assert worker._tensors(run, "cpu") == 800


def test_the_plain_loop_has_no_error_and_a_wide_loop_no_count_of_its_threads_tensors():
    reference = worker.measure(request(lineup.REFERENCE, check=True))
    assert reference["tensors"] > 0
    assert "error" not in reference
    wide = worker.measure(request("metablocks_wideloop", lineup.CONV, check=True))
    assert wide["tensors"] is None
    assert wide["error"] < 1e-13


def test_compiled_contenders_stay_out_of_smoke_sizes_and_chunks_out_of_where_they_are_none():
    compiled, chunk = (lineup.CONTENDERS[f"metablocks_{n}"] for n in ("vmap_compiled", "vmap2"))
    assert compiled.left_out(lineup.CONV) is None
    assert compiled.left_out(lineup.CONV.with_steps(20)) is None
    assert "smoke sizes" in compiled.left_out(lineup.CONV, quick=True)
    assert chunk.left_out(lineup.CONV) is None
    bfloat16 = lineup.CONTENDERS["metablocks_loop_compiled_bfloat16"]
    assert bfloat16.left_out(lineup.CONV) is None
    assert "half precision" in bfloat16.left_out(lineup.SINUSOID)
    assert "no more than one chunk" in chunk.left_out(lineup.CASES["memory"])
    reason = compiled.left_out(lineup.CONV, quick=True)
    text = report.section(lineup.CONV, [], SETTINGS, {"metablocks_vmap_compiled": reason})
    assert f"Not measured: `metablocks_vmap_compiled` ({reason}" in text


@pytest.fixture(scope="module")
def tensors():
    """Bytes of tensors in a meta-gradient beyond the model, of `lora` at a size that is soon done."""

    def count(name, **changes):
        small = dataclasses.replace(lineup.LORA, width=512, shots=1, queries=1, **changes)
        run = contenders.make(
            lineup.CONTENDERS[name], build(small, device="cpu", dtype=torch.float32)
        )
        run()  # the first also looks at the model
        return worker._tensors(run, "cpu")

    return count


@pytest.mark.parametrize("name", ["metablocks_loop", "metablocks_adjoint_loop"])
def test_memory_grows_with_what_adapts_and_not_with_a_frozen_backbone(name, tensors):
    full, half, twice = tensors(name), tensors(name, layers=10), tensors(name, adapted=10)
    added = 10 * 512**2 * 4  # bytes of the weights that the full backbone has more than the half
    assert full - half < added / 4  # activations; a single copy of the weights would be all of it
    assert 1.5 < twice / full < 2.1  # activations do not double
    assert (
        full < 5 * 512**2 * 4
    )  # nor is a matrix of the weights' size held for each layer and step


def test_a_second_order_gradient_of_lora_takes_little_more_than_a_step_of_fine_tuning(tensors):
    """Weights included, at most 1.5 times; of the 20 M weights of the case itself it is 1.07."""
    model = build(
        dataclasses.replace(lineup.LORA, width=512), device="cpu", dtype=torch.float32
    ).model
    weights = sum(p.nbytes for p in model.parameters())
    step, adjoint = tensors("fine_tuning"), tensors("metablocks_adjoint_loop")
    assert 0 < step < adjoint
    assert weights + adjoint < 1.5 * (weights + step)


def test_a_step_of_fine_tuning_is_a_scale_for_memory_with_the_weights_and_for_nothing_else():
    assert lineup.CONTENDERS["fine_tuning"].left_out(lineup.LORA) is None
    assert "pre-trained net" in lineup.CONTENDERS["fine_tuning"].left_out(lineup.SINUSOID)
    problem = build(lineup.LORA.quick(), device="cpu", dtype=torch.float64)
    images, labels, _, _ = next(iter(problem))
    value = problem.loss(problem.model(images), labels)
    expected = torch.autograd.grad(value, list(problem.trainable.values()))
    run = contenders.make(lineup.CONTENDERS["fine_tuning"], problem)
    for _ in range(2):  # which leave the model as it was
        assert all(map(torch.equal, run().values(), expected))
    result = worker.measure(request("fine_tuning", lineup.LORA, check=True))
    assert "error" not in result
    assert result["weights"] == sum(4 * p.numel() for p in problem.model.parameters())

    def score(name, tensors, peak, **fields):
        sizes = {"peaks": [peak * 2**20], "tensors": tensors * 2**20, "weights": 90 * 2**20}
        return measure.Score(lineup.CONTENDERS[name], [0.001], **sizes, **fields)

    scores = [score("higher", 30, 40, error=0.0), score("fine_tuning", 10, 20)]
    scores.append(dataclasses.replace(scores[0], tensors=None))
    text = report.section(lineup.LORA, scores, SETTINGS, {})
    assert "| with the weights, 90.0 MiB | of tensors | / fine-tuning | peak memory |" in text
    assert "| higher | 120.0 MiB | 1.20× | 130.0 MiB | 1.18× |" in text
    assert (
        "| one step of fine-tuning, first order | 100.0 MiB | 1.00× | 110.0 MiB | 1.00× |" in text
    )
    assert "| higher | – | – | 130.0 MiB | 1.18× |" in text
    assert "order | 1.00 ms | 1.00 ms – 1.00 ms | – | 20.0 MiB | 10.0 MiB | – | – |" in text
    assert "with the weights" not in report.section(lineup.LORA, scores[:1], SETTINGS, {})


def test_a_backbone_of_20_million_is_frozen_but_for_100_thousand_and_torchopt_is_left_out():
    case = lineup.CASES["memory-lora"]
    problem = build(case, device="cpu", dtype=torch.float32)
    adapting = sum(p.numel() for p in problem.trainable.values())
    frozen = sum(p.numel() for p in problem.model.parameters()) - adapting
    assert (round(frozen / 1e6), adapting) == (22, 102_400)  # the layers, and both ends
    assert "20 layers of 21.0 M frozen weights, 5 of them with 102 k that adapt" in case.summary
    assert "frozen parameters" in lineup.CONTENDERS["torchopt"].left_out(case)
    half = lineup.CASES["memory-lora-half-backbone"]
    scores = [measure.Score(lineup.CONTENDERS["higher"], [1.0], [1], error=0.0)]
    assert report.growth([(case.quick(), scores), (half.quick(), scores)]) == []


def test_variants_in_the_number_of_steps_are_cases_of_their_own():
    k64 = lineup.SINUSOID.with_steps(64)
    assert (k64.name, k64.steps, k64.repeats) == ("sinusoid-k64", 64, 2)
    assert lineup.SINUSOID.with_steps(1).repeats == lineup.SINUSOID.repeats
    assert lineup.SINUSOID.with_steps(20).repeats == 5


def test_the_growth_of_memory_is_that_from_the_fewest_to_the_most_steps():
    def scores(unrolled, adjoint):
        return [
            measure.Score(
                lineup.CONTENDERS[name],
                [0.001],
                [peak * 2**20],
                tensors=(peak - 5) * 2**20,
                error=0.0,
            )
            for name, peak in (("metablocks_loop", unrolled), ("metablocks_adjoint_loop", adjoint))
        ]

    case = lineup.CASES["memory"]
    [text] = report.growth(
        [(case.with_steps(64), scores(640, 13)), (case.with_steps(1), scores(20, 10))]
    )
    assert "## memory: cost by inner steps" in text
    assert (
        "| 1.00 ms | 1.00 ms | 640.0 MiB | 20.0 MiB | 635.0 MiB | 15.0 MiB | 32.00× | 42.33× |"
        in text
    )
    assert "| 1.00 ms | 1.00 ms | 13.0 MiB | 10.0 MiB | 8.0 MiB | 5.0 MiB | 1.30× | 1.60× |" in text
    assert report.growth([(case, scores(1, 1)), (lineup.CONV, scores(1, 1))]) == []


def test_a_ratio_has_the_range_of_its_rounds_and_a_first_call_what_compiling_took():
    higher = measure.Score(lineup.CONTENDERS["higher"], [0.1, 0.3, 0.2], [2**20], error=0.0)
    ours = measure.Score(
        lineup.CONTENDERS["metablocks_vmap_compiled"],
        [0.1, 0.1, 0.1],
        [2**20],
        first=63.2,
        compiling=800 * 2**20,
        error=0.0,
    )
    text = report.section(lineup.SINUSOID, [higher, ours], SETTINGS, {})
    row = next(line for line in text.splitlines() if line.startswith(f"| {ours.contender.title}"))
    assert "| 2.00× (1.00–3.00) | 1.0 MiB | – | 63.2 s, 800.0 MiB |" in row


@pytest.mark.parametrize(
    ("setting", "said", "kept"),
    [
        ("kept", "freed memory, in every contender's process", (True, True)),
        ("as-run", "freed memory, in the processes of ours alone, whose net has", (False, True)),
        ("as-is", None, (False, False)),
    ],
)
def test_what_becomes_of_freed_memory_is_said_and_done(setting, said, kept, monkeypatch):
    settings = dataclasses.replace(SETTINGS, freed_memory=setting)
    text = report.heading([], settings)
    assert said in text if said else "freed memory" not in text
    requests = [settings.request(lineup.CONTENDERS[n]) for n in ("higher", "metablocks_loop")]
    assert tuple(asked["keep_freed_memory"] for asked in requests) == kept
    assert [asked["as_published"] for asked in requests] == [setting == "as-run", False]
    done = []
    monkeypatch.setattr(worker, "keep_freed_memory", lambda: done.append(True))
    worker.measure(request("plain_loop", keep_freed_memory=kept[1]))
    assert bool(done) == kept[1]


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
    text = report.section(lineup.SINUSOID, scores, SETTINGS, {})
    assert "| TorchOpt | 100.0 ms | 50.0 ms – 900.0 ms | 1.00× (1.00–1.00) |" in text
    assert (
        "| metablocks Unrolled × Vmap | 20.0 ms | 20.0 ms – 20.0 ms | 5.00× (2.50–45.00) |" in text
    )
    assert "higher and TorchOpt; the fastest is TorchOpt." in text


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
    assert f"torch {version('torch')}" in done.stdout
    assert "threads: 1" in done.stdout
    for title, error in (
        ("plain loop", "reference"),
        ("TorchOpt", r"\S+e[+-]\d+"),
        ("metablocks Unrolled × Vmap", r"\S+e[+-]\d+"),
    ):
        ms, mebibytes = r"[\d.]+ ms", r"[\d.]+ MiB"
        cells = (title, ms, f"{ms} – {ms}", r"[\d.]+×", mebibytes, mebibytes, ms, error)
        row = r"\| " + r" \| ".join(cells) + r" \|"
        assert re.search(row, done.stdout), done.stdout
    assert "Peers are higher and TorchOpt; the fastest is TorchOpt." in done.stdout
    assert out.read_text(encoding="utf-8").split() == done.stdout.split()
    assert "Traceback" not in done.stderr


WHOLE = lineup.CASES["end_to_end"].quick()


def corners(folder, classes=6, images=4):
    """Image files of one brightness each, and a white corner: at the top left."""
    for number in range(classes * images):
        place = folder / "train" / f"class {number // images}"
        place.mkdir(parents=True, exist_ok=True)
        image = Image.new("L", (105, 105), 5 * number)
        image.paste(255, (0, 0, 40, 40))
        image.save(place / f"{number}.png")


@pytest.mark.parametrize("draw", [end_to_end.ours, end_to_end.peers])
def test_a_task_of_image_files_has_other_images_of_the_same_turned_classes(draw, tmp_path):
    corners(tmp_path)
    batches = draw(tmp_path, WHOLE)
    turns = set()
    for tasks in (next(batches), next(batches)):
        assert tasks.support[0].shape == (WHOLE.tasks, 5, 1, 28, 28)
        assert tasks.query[0].shape == (WHOLE.tasks, 10, 1, 28, 28)
        for task in (tasks[n] for n in range(WHOLE.tasks)):
            images, labels = (
                torch.cat(pair) for pair in zip(task.support, task.query, strict=True)
            )
            assert len(set(task.support[1].tolist())) == 5
            values = (255 * images[:, 0, 12:16, 12:16].mean((1, 2)) / 5).round().int()
            assert len(set(values.tolist())) == 15  # all different
            ends = images[:, 0, ::27, ::27].flatten(1).argmax(1)
            for label in range(5):
                mine = labels == label
                assert len(set((values[mine] // 4).tolist())) == 1  # of one class
                assert len(set(ends[mine].tolist())) == 1  # turned alike
            turns |= set(ends.tolist())
    assert len(turns) == 4


@pytest.mark.parametrize("name", ["higher", "metablocks_wideloop"])
def test_a_whole_meta_iteration_is_measured_part_by_part(name, tmp_path):
    corners(tmp_path)
    result = worker.measure(request(name, WHOLE, folder=str(tmp_path), repeats=2))
    assert list(result["parts"]) == list(end_to_end.PARTS)
    assert all(seconds > 0 for seconds in result["parts"].values())
    score = measure.Score(lineup.CONTENDERS[name])
    measure._take(score, {**result, "parts": {"images": 0.25, "gradient": 0.5}})
    text = report.section(WHOLE, [score], SETTINGS, {})
    assert "| of a meta-iteration | images | gradient |" in text
    assert f"| {score.contender.title} | 250.0 ms | 500.0 ms |" in text


def test_a_meta_iteration_moves_the_model_by_the_gradient_of_the_tasks_it_drew(tmp_path):
    corners(tmp_path)
    contender = lineup.CONTENDERS["metablocks_loop"]
    problem = build(WHOLE, device="cpu", dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in problem.trainable.items()}
    run = contenders.make(contender, problem)
    noise = run()
    iteration = end_to_end.Iteration(run, contender, WHOLE, problem, tmp_path)
    grads = iteration(lambda: 0.0)
    drawn = next(end_to_end.ours(tmp_path, WHOLE)).to(torch.float64)
    assert torch.equal(problem.tasks.query[0], drawn.query[0])
    for name, p in problem.trainable.items():
        moved = -1e-3 * grads[name] / (grads[name].abs() + 1e-8)  # the first step of Adam
        assert torch.allclose(p.detach() - before[name], moved, atol=1e-12)
    assert any(not torch.allclose(noise[name], grads[name]) for name in grads)


def test_processes_have_no_whole_meta_iteration(tmp_path):
    contender = lineup.CONTENDERS["metablocks_wideloop_processes"]
    assert "of a few" in contender.left_out(lineup.CASES["end_to_end"])
    with pytest.raises(ValueError, match="would keep their first tasks"):
        end_to_end.Iteration(None, contender, WHOLE, None, tmp_path)


def test_end_to_end_runs_from_the_command_with_images_of_its_own():
    done = bench("end_to_end", "--quick", "--contender", "metablocks_loop", "--repeats", "1")
    assert done.returncode == 0, done.stderr
    assert "images of 105×105 PNG files; 3 tasks, 5-way 1-shot, 2 queries a class" in done.stdout
    assert "| of a meta-iteration | tasks and images | meta-gradient | optimiser |" in done.stdout
    assert "Peers are higher and TorchOpt; neither was measured." in done.stdout


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
        (["--steps", "1,many"], "takes an integer of at least 1, given many"),
        (["--without", "*"], "--without leaves no contender to measure"),
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

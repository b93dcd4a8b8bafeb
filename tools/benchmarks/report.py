"""What was measured, as Markdown: where and how, a table a case, and what the table says."""

import os
import platform
import shlex
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tools.benchmarks.lineup import CONTENDERS, Case
from tools.benchmarks.measure import ROOT, Score, Settings

DISTRIBUTIONS = ("torch", "higher", "torchopt")


def heading(argv: Sequence[str], settings: Settings) -> str:
    """The command, the machine, the versions and the commit."""
    lines = [
        "# Benchmark",
        "",
        f"- command: `{shlex.join(['tools/bench', *argv])}`",
        f"- machine: {_cpu()}, {os.cpu_count() or 1} cores, {_load()}",
        f"- python {platform.python_version()}, " + ", ".join(map(_version, DISTRIBUTIONS)),
        f"- commit: {_commit()}",
        f"- {settings.device}, {settings.dtype}, threads: {settings.threads}; "
        f"rounds: {settings.rounds}, in each a fresh process for every contender",
    ]
    where = {
        "kept": "every contender's process",
        "as-run": "the processes of ours alone, whose net has its pools before ReLU",
    }
    if settings.device == "cpu" and settings.freed_memory in where:
        lines.append(f"- the C library keeps freed memory, in {where[settings.freed_memory]}")
    if settings.quick:
        lines.append("- **smoke sizes (`--quick`): these figures show that it runs, nothing more**")
    return "\n".join(lines) + "\n"


def section(
    case: Case, scores: Sequence[Score], settings: Settings, left_out: Mapping[str, str]
) -> str:
    """The table of a case, and who was left out and why."""
    best = fastest_peer(scores)
    repeats = settings.repeats or case.repeats
    peers = " and ".join(c.title for c in CONTENDERS.values() if c.role == "peer")
    peers += f"; the fastest is {best.contender.title}" if best else "; neither was measured"
    devices = {score.device for score in scores if score.device not in (None, "cpu")}
    head = (
        "contender|median|min–max of rounds|speed / fastest peer|peak memory|of tensors|first call|"
        "gradient error"
    )
    lines = [
        f"## {case.name}",
        "",
        f"{case.summary}{''.join(f'; on {name}' for name in sorted(devices))}. Times are medians over "
        f"the runs of a process ({repeats}), then over the rounds; ratios are between medians, in "
        f"brackets the least and the greatest of a round. Peers are {peers}. "
        "Peak memory is the process's, beyond that with its libraries loaded; of tensors is the most "
        "that tensors held at a time, without what the C library's allocator leaves between them. "
        "The gradient error is relative to the plain loop's gradient, in float64 (bfloat16: as it is).",
        "",
        *([_COMPILED, ""] if any(score.contender.compile for score in scores) else []),
        *_table(head.split("|"), [_row(score, best) for score in scores]),
        *_with_weights(scores),
        *_parts(scores),
        *(f"- {line}" for line in _absent(left_out)),
    ]
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table whose numbers stand to the right."""
    rule = "|---|" + "---:|" * (len(head) - 1)
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return [lines[0], rule, *lines[1:], ""]


def _parts(scores: Sequence[Score]) -> list[str]:
    """Where the time of a whole meta-iteration goes: a table, medians over the rounds."""
    measured = [score for score in scores if score.parts]
    if not measured:
        return []
    parts = list(measured[0].parts[0])
    rows = []
    for score in measured:
        times = [statistics.median(one[part] for one in score.parts) for part in parts]
        rows.append([score.contender.title, *map(_time, times)])
    return _table(["of a meta-iteration", *parts], rows)


_COMPILED = (
    "Traced and compiled contenders: the first call does that, in the first round with nothing cached "
    "(beside its seconds the peak memory that it took); the peak memory is that of the calls after it; "
    "all are held to the same computation as it is in each run, in its own dtype."
)


def growth(measured: Sequence[tuple[Case, Sequence[Score]]]) -> list[str]:
    """For each case measured at several numbers of inner steps: cost by the number of steps."""
    groups: dict[Case, list[tuple[Case, Sequence[Score]]]] = {}
    for case, scores in measured:
        name = case.name.rpartition("-k")[0] or case.name
        alike = replace(case, name=name, steps=1, repeats=1)
        groups.setdefault(alike, []).append((case, scores))
    return [_growth(case.name, group) for case, group in groups.items() if len(group) > 1]


def _growth(name: str, group: Sequence[tuple[Case, Sequence[Score]]]) -> str:
    steps = [case.steps for case, _ in group]
    by_name = [{s.contender.name: s for s in scores if s.ranked} for _, scores in group]
    kinds = ("median", "peak memory", "of tensors")
    heads = [f"{kind}, K={k}" for kind in kinds for k in steps]
    rows = []
    for key in CONTENDERS:
        scores = [scores.get(key) for scores in by_name]
        if not any(scores):
            continue
        times = [_time(s.seconds) if s else "–" for s in scores]
        cells, ratios = times, []
        for peaks in ([s and s.peak for s in scores], [s and s.tensors for s in scores]):
            cells += [_mebibytes(peak) for peak in peaks]
            high, low = (peaks[steps.index(end)] for end in (max(steps), min(steps)))
            ratios.append(f"{high / low:.2f}×" if high and low else "–")
        rows.append([CONTENDERS[key].title, *cells, *ratios])
    lines = [
        f"## {name}: cost by inner steps",
        "",
        "From the tables above: medians and peak memory after K inner steps, and how many times the "
        f"peak memory of K={min(steps)} that of K={max(steps)} is, the process's and the tensors'.",
        "",
        *_table(["contender", *heads, "memory growth", "of tensors"], rows),
    ]
    return "\n".join(lines)


def _absent(left_out: Mapping[str, str]) -> list[str]:
    """A line for each reason."""
    titles: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        titles.setdefault(reason, []).append(f"`{name}`")
    return [
        f"Not measured: {', '.join(names)} ({reason}; `--contender` measures what it names)."
        for reason, names in titles.items()
    ]


def fastest_peer(scores: Sequence[Score]) -> Score | None:
    peers = [score for score in scores if score.contender.role == "peer" and score.ranked]
    return min(peers, key=lambda score: score.seconds, default=None)


def _row(score: Score, best: Score | None) -> list[str]:
    title = score.contender.title
    if score.failure is not None:
        failure = score.failure.replace("|", "\\|").replace("\n", " ")
        return [title, f"failed: {failure}", *"––––––"]
    compared = score.ranked and score.contender.role != "scale"
    ratio = _ratio(score, best) if best and compared else "–"
    if score.wrong:
        ratio = "not ranked"
    spread = f"{_time(min(score.medians))} – {_time(max(score.medians))}"
    first = "–" if score.first is None else _time(score.first)
    if score.compiling is not None:
        first += f", {_mebibytes(score.compiling)}"
    memory = [_mebibytes(score.peak), _mebibytes(score.tensors)]
    return [title, _time(score.seconds), spread, ratio, *memory, first, _error(score)]


def _ratio(score: Score, best: Score) -> str:
    """How much faster than `best`: of the medians over rounds, and its range over rounds."""
    rounds = [b / s for b, s in zip(best.medians, score.medians, strict=True)]
    spread = f" ({min(rounds):.2f}–{max(rounds):.2f})" if len(rounds) > 1 else ""
    return f"{best.seconds / score.seconds:.2f}×{spread}"


def _with_weights(scores: Sequence[Score]) -> list[str]:
    """A table of peaks, the model's weights included, beside those of the contender that is a scale."""
    measured = [score for score in scores if score.ranked]
    scale = next((score for score in measured if score.contender.role == "scale"), None)
    if scale is None:
        return []
    weights = f"with the weights, {_mebibytes(scale.weights)}"
    rows = []
    for score in measured:
        cells = [score.contender.title]
        for size, unit in ((score.tensors, scale.tensors), (score.peak, scale.peak)):
            known = size is not None and unit is not None
            cells += [_mebibytes(size + score.weights)] if known else ["–"]
            cells += [f"{(size + score.weights) / (unit + scale.weights):.2f}×"] if known else ["–"]
        rows.append(cells)
    return _table([weights, "of tensors", "/ fine-tuning", "peak memory", "/ fine-tuning"], rows)


def _error(score: Score) -> str:
    if score.contender.role == "scale":
        return "–"
    if score.error is None:
        return "reference"
    return f"**wrong: {score.error:.1e}**" if score.wrong else f"{score.error:.1e}"


def _mebibytes(count: float | None) -> str:
    return "–" if count is None else f"{count / 2**20:.1f} MiB"


def _time(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.1f} s"
    milliseconds = 1000 * seconds
    return f"{milliseconds:.2f} ms" if milliseconds < 10 else f"{milliseconds:.1f} ms"


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _load() -> str:
    if not hasattr(os, "getloadavg"):
        return "load unknown"
    load = os.getloadavg()[0]
    warning = "; **other work is running, which distorts these figures**" if load > 0.5 else ""
    return f"load average {load:.1f} at the start{warning}"


def _version(distribution: str) -> str:
    try:
        return f"{distribution} {version(distribution)}"
    except PackageNotFoundError:
        return f"{distribution} not installed"


def _commit() -> str:
    try:
        name = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "metablocks", "tools/benchmarks")
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
    return f"{name}, with uncommitted changes" if changed else name


def _git(*arguments: str) -> str:
    argv = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()

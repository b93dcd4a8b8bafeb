"""The command line of `tools/bench`."""

import argparse
import difflib
import fnmatch
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import get_args

from tools.benchmarks.lineup import CASES, CONTENDERS, REFERENCE, Case
from tools.benchmarks.measure import Freed, Score, Settings, measure_case
from tools.benchmarks.report import growth, heading, section

EXAMPLES = """examples:
  tools/bench                             every case
  tools/bench sinusoid --out bench.md     one case, the tables also into a file
  tools/bench conv --contender metablocks_vmap --contender higher --quick
  tools/bench conv --contender plain_loop --contender 'metablocks_*' --without '*_compiled'
  tools/bench memory --steps 1,64         inner steps 1 and 64, and how cost grows with them
  tools/bench 'memory-lora*'              a frozen backbone: half of it, and twice as much that adapts
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0; 1 where one of our own contenders failed or is wrong; 2 for bad arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        print(_listing())
        return 0
    names = _known(parser, "case", options.cases, CASES) or list(CASES)
    named = _known(parser, "contender", options.contender, CONTENDERS)
    without = _known(parser, "contender", options.without, CONTENDERS)
    contenders = [name for name in named or CONTENDERS if name not in without]
    if not contenders:
        parser.error("--without leaves no contender to measure")
    if options.out and not options.out.resolve().parent.is_dir():
        parser.error(f"--out {options.out}: there is no folder {options.out.parent}")
    settings = Settings(
        device=options.device,
        dtype=options.dtype,
        threads=options.threads or (1 if options.quick else _available()),
        rounds=options.rounds or (1 if options.quick else 3),
        quick=options.quick,
        repeats=options.repeats,
        freed_memory=options.freed_memory,
    )
    cases = [CASES[name] for name in names]
    if options.steps:
        cases = [case.with_steps(count) for case in cases for count in options.steps]
    if settings.quick:
        cases = [case.quick() for case in cases]
    try:
        return _measure(argv, cases, contenders, settings, options.out, all_wanted=bool(named))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _measure(
    argv: Sequence[str],
    cases: Sequence[Case],
    contenders: Sequence[str],
    settings: Settings,
    out: Path | None,
    *,
    all_wanted: bool,
) -> int:
    """`all_wanted`: the contenders were named, so none is left out of a case."""
    sound = True
    measured: list[tuple[Case, list[Score]]] = []
    text = heading(argv, settings)
    print(text, flush=True)

    def show(part: str) -> None:
        nonlocal text
        print(part, flush=True)
        text += "\n" + part
        if out:
            out.write_text(text, encoding="utf-8")

    for case in cases:
        reasons = {
            name: CONTENDERS[name].left_out(case, quick=settings.quick) for name in contenders
        }
        left_out = {} if all_wanted else {n: why for n, why in reasons.items() if why is not None}
        scores = measure_case(case, [n for n in contenders if n not in left_out], settings)
        show(section(case, scores, settings, left_out))
        measured.append((case, scores))
        sound &= all(score.ranked for score in scores if score.contender.role == "ours")
    for part in growth(measured):
        show(part)
    return 0 if sound else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/bench",
        description="Time and peak memory of a whole meta-gradient: metablocks beside higher, "
        "TorchOpt and hand-written loops. Every measurement runs in a process of its own; every "
        f"gradient is checked against {REFERENCE} in float64.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: all; see --list")
    parser.add_argument(
        "--contender",
        action="append",
        default=[],
        help="only this one, in every case; may be repeated, and a pattern ('metablocks_*')",
    )
    parser.add_argument(
        "--without", action="append", default=[], help="all but this one; repeated, or a pattern"
    )
    parser.add_argument(
        "--steps",
        type=_counts,
        default=[],
        metavar="K,K,…",
        help="variants of each case with so many inner steps (conv-k20), and how cost grows",
    )
    parser.add_argument("--quick", action="store_true", help="smoke sizes, one round")
    parser.add_argument("--rounds", type=_count, help="fresh processes each (default: 3)")
    parser.add_argument(
        "--repeats", type=_count, help="timed runs in a process (default: a case's)"
    )
    parser.add_argument(
        "--freed-memory",
        choices=get_args(Freed),
        default="kept",
        help="kept by the C library in every contender's process, which is quicker; as-is, by its own "
        "ways, where the peak of a process may be lower; or as each is run, which is kept for ours, as "
        "`metablocks run` does, and as-is for others, whose net is as published (default: kept)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, … (default: cpu)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float64"])
    parser.add_argument(
        "--threads",
        type=_count,
        help=f"default: all cores ({_available()} here); 1 with --quick",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="also write the tables there")
    parser.add_argument("--list", action="store_true", help="list the cases and contenders")
    return parser


def _known(
    parser: argparse.ArgumentParser, kind: str, names: list[str], known: Iterable[str]
) -> list[str]:
    """The names, each once, patterns spelled out; exits with 2 at one that is unknown."""
    known = list(known)
    matches = [fnmatch.filter(known, name) for name in names]
    for name, found in zip(names, matches, strict=True):
        if not found:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"there are: {', '.join(known)}"
            parser.error(f'no {kind} is called "{name}"; {hint}')
    return list(dict.fromkeys(name for found in matches for name in found))


def _counts(text: str) -> list[int]:
    return list(dict.fromkeys(map(_count, text.split(","))))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes an integer of at least 1, given {text}")
    return int(text)


def _available() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _listing() -> str:
    width = max(map(len, [*CASES, *CONTENDERS]))
    return "\n".join(
        [
            "cases",
            *(f"  {name:<{width}}  {case.summary}" for name, case in CASES.items()),
            "",
            "contenders",
            *(f"  {name:<{width}}  {c.title} ({c.role})" for name, c in CONTENDERS.items()),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

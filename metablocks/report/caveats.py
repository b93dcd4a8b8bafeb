"""Where the rows of a table do not compare on all counts: what differs, in notes beside it."""

from collections.abc import Callable, Mapping, Sequence

from metablocks.report.contenders import at
from metablocks.report.processes import child_environment, cores
from metablocks.report.results import FinishedRun
from metablocks.runs.tables import TRANSDUCTIVE

Runs = Mapping[str, Sequence[FinishedRun]]
"""Finished runs by the label of their row."""


def caveats(runs: Runs, *, jobs: int, load: float | None = None) -> list[str]:
    """What a reader of the table must know, a line each.

    `jobs` is how many runs were trained side by side, 1 where none was trained; `load` the highest
    load of the machine meanwhile.
    """
    rows = {label: group for label, group in runs.items() if group}
    notes = [
        _unlike(rows, "meta-steps", lambda run: f"{run.steps:,}"),
        _unlike(rows, "tasks a meta-step", lambda run: str(at(run.values, "outer.tasks_per_step"))),
        _unlike(rows, "inner steps before the test", lambda run: str(run.test.inner_steps)),
    ]
    seeds = {label: sorted(run.seed for run in group) for label, group in rows.items()}
    if len(set(map(tuple, seeds.values()))) > 1:
        told = "; ".join(f"{label} {', '.join(map(str, each))}" for label, each in seeds.items())
        notes.append(f"seeds differ, and with them the test tasks: {told}")
    for what, tell in _CIRCUMSTANCES:
        notes.append(_unlike(rows, what, tell, "; times and memory may not compare"))
    notes.append(_unlike(rows, "the commit of metablocks", lambda run: _commit(run.record)))
    norms = [label for label, group in rows.items() if any(map(_transductive, group))]
    if norms:
        notes.append(TRANSDUCTIVE + f" (in {', '.join(norms)})" * (len(norms) < len(rows)))
    members = sorted(
        {run.ensemble.members for each in rows.values() for run in each if run.ensemble}
    )
    if members:
        notes.append(
            f"ensemble: {' or '.join(map(str, members))} checkpoints predict together, at as many "
            "times the work; the recommendation goes by the best checkpoint alone"
        )
    if jobs > 1:
        threads = child_environment(jobs)["OMP_NUM_THREADS"]
        notes.append(
            f"times were measured with {jobs} runs side by side, each on {threads} "
            f"{'thread' if threads == '1' else 'threads'}"
        )
    if load is not None and load > cores() + _OWN_LOAD:
        notes.append(
            f"the machine was busy with other work meanwhile (a load of {load:.1f} on {cores()} "
            "cores): times are longer than they need be, and not equally so"
        )
    return [note for note in notes if note]


_OWN_LOAD = 0.5  # beyond a thread on every core: this process, the system

_CIRCUMSTANCES: list[tuple[str, Callable[[FinishedRun], str]]] = [
    ("the device", lambda run: str(run.record.get("device"))),
    ("the number of threads", lambda run: str(run.record.get("threads"))),
    ("the platform", lambda run: str(run.record.get("platform"))),
    ("torch", lambda run: str(run.record.get("versions", {}).get("torch"))),
]


def _unlike(rows: Runs, what: str, tell: Callable[[FinishedRun], str], so: str = "") -> str:
    """A note where runs, of one row too, differ in something; or nothing."""
    told = {label: ", ".join(sorted({tell(run) for run in group})) for label, group in rows.items()}
    if len({tell(run) for group in rows.values() for run in group}) < 2:
        return ""
    return f"{what}: {'; '.join(f'{label} {value}' for label, value in told.items())}{so}"


def _transductive(run: FinishedRun) -> bool:
    return bool(run.record.get("transductive"))


def _commit(record: Mapping[str, object]) -> str:
    commit = str(record.get("commit") or "unknown")
    return commit[:10] + ("+" if commit.endswith("+") else "")

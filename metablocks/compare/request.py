"""The request for a comparison: the arguments of the command `compare`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

Seeds: TypeAlias = int | tuple[int, ...]
"""A number of seeds, counted up from the first recipe's own; or the seeds themselves."""


@dataclass(frozen=True)
class Request:
    """The arguments of `metablocks compare`."""

    names: Sequence[str]
    """Recipes to train, and folders of finished runs."""
    overrides: Sequence[str] = ()
    allow: Sequence[str] = ()
    """Packages whose blocks recipes may use."""
    seeds: Seeds = 1
    steps: int | None = None
    """Meta-steps of every recipe."""
    minutes: float | None = None
    """Training time of every run."""
    tasks: int | None = None
    """Evaluation tasks of every recipe."""
    jobs: int = 1
    """Runs trained side by side."""
    out: Path = Path("comparisons")
    data: Path | None = None
    device: str | None = None
    plan: bool = False
    """Print the commands that train the runs, and train none."""
    quiet: bool = False
    argv: Sequence[str] = ()

    @property
    def recipe_overrides(self) -> tuple[str, ...]:
        """Overrides for every recipe, before the budget's."""
        tasks = () if self.tasks is None else (f"evaluation.tasks={self.tasks}",)
        return (*self.overrides, *tasks)

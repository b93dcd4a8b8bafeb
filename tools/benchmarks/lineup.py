"""The cases and the contenders, as data. Nothing here imports torch: the command stays small.

A new case is an entry of `CASES`, most often a `replace` of another. A new contender is an entry of
`CONTENDERS` and a function of its name in `contenders.py`.
"""

from dataclasses import dataclass, replace
from typing import Literal

Role = Literal["reference", "peer", "ours"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem whose meta-gradient is measured.

    `data` is "sinusoid" (MLP 1-40-40-1, ReLU, squared error) or "images" (`Conv4` with batch norm on
    random 28×28 images, cross-entropy). `shots` and `queries` count examples of a class, or of a
    task in regression. `repeats` is how often a process times the computation.
    """

    name: str
    data: Literal["sinusoid", "images"]
    tasks: int
    shots: int
    queries: int
    steps: int = 5
    rate: float = 0.01
    second_order: bool = True
    filters: int = 64
    ways: int = 5
    repeats: int

    @property
    def summary(self) -> str:
        order = "second order" if self.second_order else "first order"
        if self.data == "sinusoid":
            net = "MLP 1-40-40-1 ReLU"
            examples = f"{self.shots}-shot, {self.queries} queries"
        else:
            net = f"Conv4 of {self.filters} filters with batch norm, random 28×28 images"
            examples = f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class"
        return f"{net}; {self.tasks} tasks, {examples}, {self.steps} inner steps of {self.rate}, {order}"

    def quick(self) -> "Case":
        """The same code at a size that proves the path and measures nothing."""
        return replace(self, tasks=3, queries=min(self.queries, 2), steps=2, filters=4, repeats=3)


@dataclass(frozen=True)
class Contender:
    """One way to the meta-gradient; `contenders.py` has a function of this `name`."""

    name: str
    title: str
    role: Role


SINUSOID = Case(name="sinusoid", data="sinusoid", tasks=25, shots=5, queries=5, repeats=20)
CONV = Case(name="conv", data="images", tasks=8, shots=1, queries=15, repeats=5)

CASES = {
    case.name: case
    for case in (
        SINUSOID,
        replace(SINUSOID, name="sinusoid-first-order", second_order=False),
        CONV,
        replace(CONV, name="conv-first-order", second_order=False),
    )
}

REFERENCE = "plain_loop"
"""The contender whose gradient the others are held to."""

CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("plain_loop", "plain loop", "reference"),
        Contender("plain_vmap", "plain vmap", "reference"),
        Contender("higher", "higher", "peer"),
        Contender("torchopt", "TorchOpt", "peer"),
        Contender("metablocks_loop", "metablocks Unrolled × Loop", "ours"),
        Contender("metablocks_vmap", "metablocks Unrolled × Vmap", "ours"),
    )
}

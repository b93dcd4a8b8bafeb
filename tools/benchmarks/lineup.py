"""The cases and the contenders, as data. Nothing here imports torch: the command stays small.

A new case is an entry of `CASES`, most often a `replace` of another. A new contender of ours is an
entry of `CONTENDERS`; one of another library is an entry and a function of its name in
`contenders.py`.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

Role = Literal["reference", "peer", "ours", "scale"]

NETS = {
    "mlp": "MLP 1-40-40-1 ReLU, sinusoids",
    "conv4": "4 × [3×3 conv, batch norm, ReLU, 2×2 max-pool]",
    "conv4-strided": "4 × [3×3 conv of stride 2, batch norm, ReLU]",
    "conv12": "12 × [3×3 conv, batch norm, ReLU], 2×2 max-pool after the 3rd, 6th and 9th",
    "lora": "residual MLP, frozen; (1/r) B A beside some of its layers adapts",
}
"""What `problem.py` can build. All but the MLP take random 28×28 images, and have a linear head."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One problem whose meta-gradient is measured.

    `net` is one of `NETS`; the loss is the squared error for the MLP, cross-entropy for images.
    `shots` and `queries` count examples of a class, or of a task in regression. `filters` is of the
    convolutional nets; `layers`, `adapted` (how many of them adapt), `width` and `rank` are of "lora".
    `repeats` is how often a process times the computation. If `whole`, that is a whole
    meta-iteration on tasks of image files (`end_to_end.py`).
    """

    name: str
    net: str
    tasks: int
    shots: int
    queries: int
    steps: int = 5
    rate: float = 0.01
    second_order: bool = True
    filters: int = 64
    layers: int = 20
    adapted: int = 5
    width: int = 1024
    rank: int = 10
    ways: int = 5
    whole: bool = False
    repeats: int

    @property
    def summary(self) -> str:
        order = "second order" if self.second_order else "first order"
        if self.net == "mlp":
            net = NETS[self.net]
            examples = f"{self.shots}-shot, {self.queries} queries"
        else:
            images = "images of 105×105 PNG files" if self.whole else "random 28×28 images"
            net = f"{NETS[self.net]}, {self._size}, {images}"
            examples = f"{self.ways}-way {self.shots}-shot, {self.queries} queries a class"
        tasks = f"{self.tasks} task{'s' if self.tasks > 1 else ''}"
        steps = f"{self.steps} inner step{'s' if self.steps > 1 else ''}"
        return f"{net}; {tasks}, {examples}, {steps} of {self.rate}, {order}"

    @property
    def _size(self) -> str:
        if self.net != "lora":
            return f"{self.filters} filters"
        frozen = self.layers * self.width**2 / 1e6
        adapting = self.adapted * 2 * self.rank * self.width / 1e3
        return (
            f"{self.layers} layers of {frozen:.1f} M frozen weights, {self.adapted} of them with "
            f"{adapting:.0f} k that adapt"
        )

    def quick(self) -> "Case":
        """The same code at a size that proves the path and measures nothing."""
        return replace(
            self,
            tasks=min(self.tasks, 3),
            queries=min(self.queries, 2),
            steps=min(self.steps, 2),
            filters=4,
            layers=4,
            adapted=min(self.adapted, 2),
            width=8,
            rank=2,
            repeats=3,
        )

    def with_steps(self, steps: int) -> "Case":
        """The same with another number of inner steps; timed for about as long in all."""
        repeats = self.repeats * self.steps // steps
        return replace(
            self,
            name=f"{self.name}-k{steps}",
            steps=steps,
            repeats=max(2, min(self.repeats, repeats)),
        )


@dataclass(frozen=True)
class Contender:
    """One way to the meta-gradient; of role "scale" something else, whose memory theirs is set beside.

    Ours are an estimator and an executor, by name; of the others `contenders.py` has a function of
    this `name`. `compile` is the executor's setting; `wide` takes as many workers as torch has threads,
    and images channels last (of query sets, in first order all); with `processes`, too, these are
    processes of one thread each, whose memory is not counted but for the first's; `bfloat16` computes
    under autocast, and is not held to exactness.
    """

    name: str
    title: str
    role: Role
    estimator: str = ""
    executor: str = ""
    chunk: int | None = None
    compile: bool | str = False
    wide: bool = False
    bfloat16: bool = False
    processes: bool = False

    def left_out(self, case: Case, *, quick: bool = False) -> str | None:
        """Why it is not measured on a case unless it is named; None where it is."""
        if self.compile is True and quick:
            return "compiling takes longer than all else at smoke sizes"
        if case.whole and self.name not in WHOLE:
            return "a whole meta-iteration is measured of a few"
        if self.name == "torchopt" and case.net == "lora":
            return "its MetaSGD differentiates by frozen parameters too, which autograd refuses"
        if self.role == "scale" and case.net != "lora":
            return "fine-tuning is compared with where a pre-trained net is adapted by little of it"
        if self.bfloat16 and case.net == "mlp":
            return "half precision is for nets whose time goes into products of matrices"
        if self.wide and (case.net == "mlp" or case.tasks == 1):
            return "threads and the layout of images are for several tasks of images"
        if self.chunk is not None and self.chunk >= case.tasks:
            return f"there is no more than one chunk of {self.chunk} tasks"
        if self.chunk is not None and case.net == "mlp":
            return "chunks trade time for memory, of which small nets need little"
        return None


SINUSOID = Case(name="sinusoid", net="mlp", tasks=25, shots=5, queries=5, repeats=20)
CONV = Case(name="conv", net="conv4", tasks=8, shots=1, queries=15, repeats=5)
LORA = Case(name="lora", net="lora", tasks=1, shots=5, queries=5, repeats=3)

CASES = {
    case.name: case
    for case in (
        SINUSOID,
        replace(SINUSOID, name="sinusoid-first-order", second_order=False),
        CONV,
        replace(CONV, name="conv-first-order", second_order=False),
        replace(CONV, name="conv-strided", net="conv4-strided"),
        replace(CONV, name="deep", net="conv12", tasks=4, filters=32, repeats=3),
        replace(CONV, name="end_to_end", tasks=4, rate=0.1, whole=True),
        replace(CONV, name="memory", tasks=1, shots=5, queries=5),
        replace(LORA, name="memory-lora"),
        replace(LORA, name="memory-lora-half-backbone", layers=10),
        replace(LORA, name="memory-lora-twice-adapted", adapted=10),
    )
}

WHOLE = (
    *("plain_loop", "higher", "torchopt"),
    *(f"metablocks_{name}" for name in ("loop", "wideloop", "loop_compiled")),
)
"""The contenders whose whole meta-iteration is measured."""

REFERENCE = "plain_loop"
"""The contender whose gradient the others are held to."""


def _ours(estimator: str, executor: str, **settings: Any) -> Contender:
    """`metablocks_vmap_compiled` and the like; names leave out the estimator `Unrolled`."""
    made = Contender("", "", "ours", estimator, executor, **settings)
    done = {False: [], True: ["compiled"], "trace": ["traced"]}[made.compile]
    done += ["bfloat16"] * made.bfloat16 + ["processes"] * made.processes
    short = f"{'wide' * made.wide}{executor.lower()}{made.chunk or ''}"
    words = ["metablocks", *([] if estimator == "Unrolled" else [estimator.lower()]), short, *done]
    chunk = f"(chunk={made.chunk})" if made.chunk else ""
    layout = ["channels last" if made.processes else "threads, channels last"] * made.wide
    title = ", ".join([f"metablocks {estimator} × {executor}{chunk}", *layout, *done])
    return replace(made, name="_".join(words), title=title)


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("plain_loop", "plain loop", "reference"),
        Contender("plain_vmap", "plain vmap", "reference"),
        Contender("higher", "higher", "peer"),
        Contender("torchopt", "TorchOpt", "peer"),
        Contender("fine_tuning", "one step of fine-tuning, first order", "scale"),
        *(
            _ours(estimator, executor, compile=compiled)
            for compiled, estimator, executor in product(
                (False, "trace", True), ("Unrolled", "Adjoint"), ("Loop", "Vmap")
            )
        ),
        *(_ours(e, "Vmap", chunk=2) for e in ("Unrolled", "Adjoint")),
        *(
            _ours(e, "Loop", wide=True, compile=compiled)
            for compiled, e in product((False, "trace", True), ("Unrolled", "Adjoint"))
        ),
        _ours("Unrolled", "Loop", wide=True, processes=True),
        _ours("Unrolled", "Loop", wide=True, compile="trace", bfloat16=True),
        _ours("Unrolled", "Loop", compile=True, bfloat16=True),
    )
}

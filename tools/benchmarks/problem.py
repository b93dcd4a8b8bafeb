"""A case made concrete: one model and one batch of tasks, the same for every contender."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metablocks import TaskBatch
from metablocks.models import MLP, Conv4, insert_lora
from metablocks.tasks.sinusoid import Sinusoid
from tools.benchmarks.lineup import Case


@dataclass
class Problem:
    """What a contender gets. Its answer is the gradient of the mean, over tasks, of the final query
    loss, with respect to `trainable`, by their names. `tasks` may be others in the next run."""

    model: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    tasks: TaskBatch
    case: Case

    @property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that adapt: all of the model's that are not frozen."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Support inputs and targets, query inputs and targets of one task after another."""
        return zip(*self.tasks.support, *self.tasks.query, strict=True)


def build(case: Case, *, device: str, dtype: torch.dtype, as_published: bool = False) -> Problem:
    """The same numbers for every contender, process and dtype, up to the dtype's rounding.

    `as_published`: the net's activations stand before its pools, where `Conv4` has the same function.

    The batch norms of the model keep no running statistics: in the inner loop and the query pass all
    contenders normalise by batch statistics, and none pays for buffers that another leaves alone.
    """
    torch.manual_seed(0)
    if case.net == "mlp":
        model: nn.Module = MLP(input_shape=(1,), outputs=1)
        tasks = Sinusoid(shots=case.shots, queries=case.queries).sample("train", range(case.tasks))
        support, query, loss = tasks.support, tasks.query, F.mse_loss
    else:
        model = _image_net(case)
        support, query = (_images(case, examples) for examples in (case.shots, case.queries))
        loss = F.cross_entropy
    for module in model.modules():
        if as_published and isinstance(module, nn.Sequential) and "pool" in module._modules:
            module._modules["pool"] = module._modules.pop("pool")
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None

    def place(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return tuple(t.to(device, dtype if t.is_floating_point() else t.dtype) for t in batch)

    return Problem(
        model=model.to(device, dtype).train(),
        loss=loss,
        tasks=TaskBatch(place(support), place(query)),
        case=case,
    )


def _image_net(case: Case) -> nn.Module:
    if case.net == "lora":
        return lora(case)
    if case.net == "conv12":
        return Deep(outputs=case.ways, filters=case.filters)
    return Conv4(
        input_shape=(1, 28, 28),
        outputs=case.ways,
        filters=case.filters,
        downsample="stride" if case.net == "conv4-strided" else "pool",
    )


class Deep(nn.Sequential):
    """12 × [3×3 convolution, batch norm, ReLU], 2×2 max-pooling after the 3rd, 6th and 9th, a head.

    28×28 images become 3×3 maps. (`Conv4` halves the image in each of its layers.)
    """

    def __init__(self, *, outputs: int, filters: int) -> None:
        blocks: list[nn.Module] = []
        for layer in range(12):
            conv = nn.Conv2d(filters if layer else 1, filters, 3, padding=1)
            blocks += [conv, nn.BatchNorm2d(filters), nn.ReLU()]
            if layer in (2, 5, 8):
                blocks.append(nn.MaxPool2d(2))
        super().__init__(*blocks, nn.Flatten(), nn.Linear(filters * 3 * 3, outputs))


class Residual(nn.Module):
    """x + ReLU(W x + b)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + F.relu(self.linear(inputs))


def lora(case: Case) -> nn.Module:
    """A frozen backbone, `case.adapted` of whose layers, evenly spread, adapt by `insert_lora`.

    The first layer is one of them, so the graph of a loss reaches through the whole backbone.
    """
    layers = [Residual(case.width) for _ in range(case.layers)]
    ends = nn.Linear(28 * 28, case.width), nn.Linear(case.width, case.ways)
    model = nn.Sequential(nn.Flatten(), ends[0], *layers, ends[1])
    adapted = range(2, 2 + case.layers, case.layers // case.adapted)
    patterns = [f"{number}.linear.weight" for number in adapted]
    return insert_lora(model, rank=case.rank, layers=patterns, freeze="*")


def _images(case: Case, examples: int) -> tuple[Tensor, Tensor]:
    """Noise with labels: `[tasks, ways × examples, 1, 28, 28]` and `[tasks, ways × examples]`."""
    labels = torch.arange(case.ways).repeat_interleave(examples).repeat(case.tasks, 1)
    return torch.randn(*labels.shape, 1, 28, 28), labels

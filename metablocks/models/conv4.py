"""The convolutional network of the few-shot literature."""

from typing import Annotated, Literal

from annotated_types import Le
from torch import Tensor, nn

from metablocks.checks import Count, checked
from metablocks.errors import BlockError
from metablocks.models.layers import ACTIVATIONS, DEEPEST, Activation, xavier

Downsample = Literal["stride", "pool"]
Norm = Literal["batch", "none"]
Features = Literal["flat", "mean"]


@checked()
class Conv4(nn.Module):
    """`layers` × [3×3 convolution, norm, activation], each halving the image, then a linear head.

    Input `[examples, *input_shape]` with `input_shape = (channels, height, width)`; output
    `[examples, outputs]`. Weights start Xavier-uniform, biases zero. Parameters are named `body.…`
    and `head.…`.

    - `filters`: channels of every convolution.
    - `layers`: number of convolutions.
    - `downsample`: how a layer halves the image: "stride" by stride 2 (Omniglot in MAML), "pool" by
      2×2 max-pooling after the activation (mini-ImageNet in MAML, and MAML++); before it for ReLU, which
      is the same function.
    - `norm`: "batch" for batch norm behind every convolution, or "none".
    - `activation`: the non-linearity of every layer.
    - `features`: what the head gets: "flat", the feature map; "mean", its mean over the image's
      places: `filters` numbers whatever the size of the image.

    Source: Vinyals et al. 2016; Finn, Abbeel, Levine 2017; initialisation as in Antoniou, Edwards,
    Storkey 2018.

    >>> import torch
    >>> model = Conv4(input_shape=(1, 28, 28), outputs=5, filters=8)
    >>> model(torch.zeros(2, 1, 28, 28)).shape
    torch.Size([2, 5])
    >>> Conv4(input_shape=(1, 28, 28), outputs=5, filters=8, layers=2, features="mean").head
    Linear(in_features=8, out_features=5, bias=True)

    Raises `BlockError` for sizes below 1, for more than 1000 layers, for an input that is not an
    image, and for an image too small for so many layers.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[Count, ...],
        outputs: Count,
        filters: Count = 64,
        layers: Annotated[Count, Le(DEEPEST)] = 4,
        downsample: Downsample = "stride",
        norm: Norm = "batch",
        activation: Activation = "relu",
        features: Features = "flat",
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise BlockError(
                f"Conv4 takes images (channels, height, width); the tasks have inputs of shape "
                f"{tuple(input_shape)}. For such inputs use MLP"
            )
        channels, height, width = input_shape
        blocks: list[nn.Module] = []
        for _ in range(layers):
            height, width = _halve(height, downsample), _halve(width, downsample)
            if height < 1 or width < 1:
                image = f"{input_shape[1]}×{input_shape[2]}"
                halved = f"can be halved only {len(blocks)} times by {downsample}"
                words = f"is {layers}, but an image of {image} {halved}"
                raise BlockError.about("Conv4", "layers", words)
            blocks.append(_block(channels, filters, downsample, norm, activation))
            channels = filters
        self.body = nn.Sequential(*blocks)
        places = height * width if features == "flat" else 1
        self.head = nn.Linear(filters * places, outputs)
        self.features = features
        xavier(self)

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(images)
        features = maps.flatten(1) if self.features == "flat" else maps.mean((2, 3))
        output: Tensor = self.head(features)
        return output


def _block(
    channels: int, filters: int, downsample: Downsample, norm: Norm, activation: Activation
) -> nn.Sequential:
    stride = 2 if downsample == "stride" else 1
    block = nn.Sequential()
    block.add_module("conv", nn.Conv2d(channels, filters, 3, stride=stride, padding=1))
    if norm == "batch":
        block.add_module("norm", nn.BatchNorm2d(filters))
    rest: list[tuple[str, nn.Module]] = [("activation", ACTIVATIONS[activation]())]
    if downsample == "pool":
        first = activation == "relu"  # the same function, and a quarter of the work
        rest.insert(0 if first else 1, ("pool", nn.MaxPool2d(2)))
    for name, module in rest:
        block.add_module(name, module)
    return block


def _halve(size: int, downsample: Downsample) -> int:
    return (size + 1) // 2 if downsample == "stride" else size // 2

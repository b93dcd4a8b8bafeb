"""A multi-layer perceptron."""

import math
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from metablocks.checks import Count, CountFrom0, checked
from metablocks.errors import BlockError
from metablocks.models.layers import ACTIVATIONS, DEEPEST, Activation, xavier


@checked()
class MLP(nn.Module):
    """Linear layers of the `hidden` widths with an activation after each, then a linear head.

    Inputs `[examples, *input_shape]` are flattened; output `[examples, outputs]`. Parameters are
    named `body.…` and `head.…`.

    - `hidden`: widths of the hidden layers; () for a linear model.
    - `activation`: the non-linearity behind every hidden layer.
    - `bias`: False leaves out the bias of every layer.
    - `init`: "xavier": weights start Xavier-uniform and biases zero; "fan_in": both start uniform
      within ±1/√inputs, as PyTorch's layers do: units that see one number then bend in different
      places.
    - `context`: so many numbers, zero at first, that every input has beside it: a parameter
      `context` of the model, which CAVIA adapts alone, with `start` zeros. 0 for none.

    Source: Finn, Abbeel, Levine 2017 (sinusoid: two hidden layers of 40, ReLU); Zintgraf et al. 2019
    (CAVIA's context parameters).

    >>> import torch
    >>> MLP(input_shape=(1,), outputs=1)(torch.zeros(5, 1)).shape
    torch.Size([5, 1])
    >>> list(MLP(input_shape=(3,), outputs=2, hidden=(4,), bias=False).state_dict())
    ['body.linear0.weight', 'head.weight']
    >>> bool(MLP(input_shape=(1,), outputs=1, init="fan_in").body.linear0.bias.any())
    True
    >>> MLP(input_shape=(1,), outputs=1, context=4).context
    Parameter containing:
    tensor([0., 0., 0., 0.], requires_grad=True)

    Raises `BlockError` for a width below 1, more than 1000 layers, an unknown activation or `init`.
    """

    context: nn.Parameter | None

    def __init__(
        self,
        *,
        input_shape: tuple[Count, ...],
        outputs: Count,
        hidden: tuple[Count, ...] = (40, 40),
        activation: Activation = "relu",
        bias: bool = True,
        init: Literal["xavier", "fan_in"] = "xavier",
        context: CountFrom0 = 0,
    ) -> None:
        super().__init__()
        if len(hidden) > DEEPEST:
            words = f"is {len(hidden)} layers; it takes at most {DEEPEST}"
            raise BlockError.about("MLP", "hidden", words)
        self.context = nn.Parameter(torch.zeros(context)) if context else None
        widths = [math.prod(input_shape) + context, *hidden]
        self.body = nn.Sequential()
        for index, (inputs, width) in enumerate(pairwise(widths)):
            self.body.add_module(f"linear{index}", nn.Linear(inputs, width, bias=bias))
            self.body.add_module(f"activation{index}", ACTIVATIONS[activation]())
        self.head = nn.Linear(widths[-1], outputs, bias=bias)
        if init == "xavier":
            xavier(self)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs.flatten(1)
        if self.context is not None:
            rows = torch.cat([rows, self.context.expand(len(rows), -1)], 1)
        output: Tensor = self.head(self.body(rows))
        return output

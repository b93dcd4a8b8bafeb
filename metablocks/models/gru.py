"""A recurrent net over tokens."""

from torch import Tensor, nn

from metablocks.checks import Count, checked
from metablocks.models.layers import check_tokens


@checked()
class GRU(nn.Module):
    """An embedding, `layers` of `nn.GRU` and a linear head.

    Input int64 `[examples, length]`, numbers below `outputs`; output `[examples, length, outputs]`: at
    each place the scores of the next token. Parameters are named `body.…` and `head.…`. It takes the
    executor `Loop`: vmap has no recurrent layers.

    - `width`: numbers of a token between the layers.
    - `layers`: number of recurrent layers.

    Source: Cho et al. 2014.

    >>> import torch
    >>> model = GRU(input_shape=(16,), outputs=256, width=8)
    >>> model(torch.zeros(2, 16, dtype=torch.int64)).shape
    torch.Size([2, 16, 256])

    Raises `BlockError` for sizes below 1, and for inputs that are not sequences.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[Count, ...],
        outputs: Count,
        width: Count = 64,
        layers: Count = 1,
    ) -> None:
        super().__init__()
        check_tokens("GRU", input_shape)
        self.body = nn.ModuleDict(
            {
                "embedding": nn.Embedding(outputs, width),
                "recurrent": nn.GRU(width, width, layers, batch_first=True),
            }
        )
        nn.init.normal_(self.body["embedding"].weight, std=width**-0.5)  # type: ignore[arg-type]
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.body["recurrent"](self.body["embedding"](tokens))
        output: Tensor = self.head(states)
        return output

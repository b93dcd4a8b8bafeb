"""A small decoder-only transformer over tokens."""

import torch
from torch import Tensor, nn

from metablocks.checks import Count, checked
from metablocks.errors import BlockError
from metablocks.models.layers import check_tokens


@checked()
class Transformer(nn.Module):
    """`layers` × [causal attention, MLP], each behind a layer norm and added to what it got.

    Input int64 `[examples, length]`, numbers below `outputs`, of at most the tasks' length; output
    `[examples, length, outputs]`: at each place the scores of the next token, of which no later token
    knows anything. Positions are learned. Parameters are named `body.…` and `head.…`; queries, keys and
    values are layers of their own (`body.block0.attention.query`).

    - `width`: numbers of a token between the layers.
    - `heads`: attention heads of a layer.
    - `layers`: number of blocks.

    Source: Vaswani et al. 2017; the layer norms' places as in Radford et al. 2019 (GPT-2).

    >>> model = Transformer(input_shape=(16,), outputs=256, width=8, heads=2, layers=1)
    >>> model(torch.zeros(2, 16, dtype=torch.int64)).shape
    torch.Size([2, 16, 256])

    Raises `BlockError` for sizes below 1, a `width` that is not a multiple of `heads`, and for inputs
    that are not sequences.
    """

    def __init__(
        self,
        *,
        input_shape: tuple[Count, ...],
        outputs: Count,
        width: Count = 64,
        heads: Count = 4,
        layers: Count = 2,
    ) -> None:
        super().__init__()
        check_tokens("Transformer", input_shape)
        if width % heads:
            words = f"is {width}, which {heads} heads cannot share; it takes a multiple of heads"
            raise BlockError.about("Transformer", "width", words)
        self.body = nn.Sequential()
        self.body.add_module("embedding", _Embedding(input_shape[0], outputs, width))
        for index in range(layers):
            self.body.add_module(f"block{index}", _Block(width, heads))
        self.body.add_module("norm", nn.LayerNorm(width))
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        output: Tensor = self.head(self.body(tokens))
        return output


class _Embedding(nn.Module):
    """The sum of a token's vector and its position's."""

    def __init__(self, length: int, tokens: int, width: int) -> None:
        super().__init__()
        self.token = nn.Embedding(tokens, width)
        self.position = nn.Parameter(torch.empty(length, width))
        for tensor in (self.token.weight, self.position):
            nn.init.normal_(tensor, std=width**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.token(tokens)
        return embedded + self.position[: tokens.shape[1]]


class _Attention(nn.Module):
    """softmax(Q Kᵀ / √d) V in each head, written out: vmap and second derivatives take it as it is."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, inputs: Tensor) -> Tensor:
        query, key, value = (
            layer(inputs).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = query @ key.mT / query.shape[-1] ** 0.5
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(-1)
        output: Tensor = self.out((weights @ value).transpose(1, 2).flatten(2))
        return output


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm0, self.norm1 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = _Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        attended: Tensor = inputs + self.attention(self.norm0(inputs))
        output: Tensor = attended + self.mlp(self.norm1(attended))
        return output

"""Modules of torch.nn that read sequences: recurrent nets, attention, embeddings."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from zoo_entry import CLASSES, Entry, normal, tokens, vectors

NO_RNN = "recurrent layers have no batching rule"


class MeanState(nn.Module):
    """A recurrent net, its states averaged."""

    def __init__(self, kind: type[nn.RNNBase], **settings: Any) -> None:
        super().__init__()
        self.recurrent = kind(4, 5, batch_first=True, **settings)
        self.head = nn.LazyLinear(CLASSES)
        self(torch.zeros(1, 2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0].mean(1))


class CellLoop(nn.Module):
    """A cell called in a loop of Python's."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
        return self.head(state)


class Packed(nn.Module):
    """Sequences of unequal length."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrent, self.head = nn.LSTM(4, 5, bidirectional=True), nn.Linear(10, CLASSES)

    def forward(self, packed: PackedSequence) -> Tensor:
        _, (hidden, _) = self.recurrent(packed)
        return self.head(torch.cat([hidden[0], hidden[1]], -1))


class Attended(nn.Module):
    """Multi-head attention that returns its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x)
        return self.head(y.mean(1)), weights


class Padded(nn.Module):
    """An encoder of sequences with padding, which is zero in the output."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(_layer(), 2)

    def forward(self, src: Tensor, padding: Tensor) -> Tensor:
        output = self.encoder(src, src_key_padding_mask=padding)
        return output.masked_fill(padding.unsqueeze(-1), 0.0)


class Tied(nn.Module):
    """A language model whose output layer is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix = nn.Embedding(20, 6), nn.Linear(6, 6)
        self.out = nn.Linear(6, 20, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.embedding(x)).tanh().mean(1))[:, :CLASSES]


class Bags(nn.Module):
    """Bags of words, given as one list with the places where they start."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bags, self.head = nn.EmbeddingBag(20, 4, mode=mode), nn.Linear(4, CLASSES)

    def forward(self, words: Tensor, starts: Tensor) -> Tensor:
        return self.head(self.bags(words.flatten(), starts).tanh())


def _words(**settings: Any) -> nn.Module:
    embedding = nn.Embedding(20, 4, **settings)
    return nn.Sequential(embedding, nn.Flatten(), nn.Tanh(), nn.Linear(12, CLASSES))


def _layer(dropout: float = 0.0) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=dropout, batch_first=True)


def _padded(n: int, _: int) -> tuple[Any, Any]:
    mask = torch.zeros(n, 4, dtype=torch.bool)
    mask[::2, 3:] = True
    return {"src": normal(n, 4, 4), "padding": mask}, normal(n, 4, 4)


def _pair(n: int, _: int) -> tuple[Any, Any]:
    return (normal(n, 4, 4), normal(n, 3, 4)), normal(n, 3, 4)


def _packed(n: int, _: int) -> tuple[Any, Any]:
    sequences = [normal(2 + n - index, 4) for index in range(n)]
    return pack_sequence(sequences), torch.randint(0, CLASSES, (n,))


def _bags(n: int, _: int) -> tuple[Any, Any]:
    words, targets = torch.randint(0, 20, (n, 3)), torch.randint(0, CLASSES, (n,))
    return (words, torch.arange(0, 3 * n, 3)), targets


ENTRIES = [
    Entry(
        name="nn.RNN",
        kind="recurrent layer, tanh",
        make=lambda: MeanState(nn.RNN),
        batch=vectors(3, 4),
        loss=F.mse_loss,
        no_vmap=NO_RNN,
    ),
    Entry(
        name="nn.GRU",
        kind="recurrent layer, two deep",
        make=lambda: MeanState(nn.GRU, num_layers=2),
        batch=vectors(3, 4),
        loss=F.mse_loss,
        no_vmap=NO_RNN,
    ),
    Entry(
        name="nn.LSTM",
        kind="recurrent layer, both ways, projected",
        make=lambda: MeanState(nn.LSTM, bidirectional=True, proj_size=2),
        batch=vectors(3, 4),
        loss=F.mse_loss,
        no_vmap=NO_RNN,
    ),
    Entry(
        name="nn.GRUCell",
        kind="a cell in a Python loop",
        make=CellLoop,
        batch=vectors(3, 4),
        loss=F.mse_loss,
    ),
    Entry(
        name="packed_sequence",
        kind="the input is a PackedSequence, a tuple that is one argument",
        make=Packed,
        batch=_packed,
        stacked=False,
        no_vmap=NO_RNN,
    ),
    Entry(
        name="nn.MultiheadAttention",
        kind="the output is a tuple: values and attention weights",
        make=Attended,
        batch=vectors(3, 4),
        loss=lambda output, target: F.mse_loss(output[0], target) + output[1].square().mean(),
    ),
    Entry(
        name="nn.TransformerEncoder",
        kind="keywords as input, a padding mask of booleans",
        make=Padded,
        no_vmap_evaluate="nested tensors, which it makes there, have no batching rule",
        batch=_padded,
        loss=F.mse_loss,
        fused_attention=True,
    ),
    Entry(
        name="nn.TransformerEncoderLayer(dropout=0.3)",
        kind="dropout, within attention too",
        make=lambda: nn.Sequential(_layer(0.3), nn.Flatten(), nn.Linear(12, CLASSES)),
        batch=vectors(3, 4),
        loss=F.mse_loss,
        random=True,
    ),
    Entry(
        name="nn.Transformer",
        kind="encoder and decoder, two positional inputs",
        make=lambda: nn.Transformer(4, 2, 1, 1, 8, dropout=0.0, batch_first=True),
        batch=_pair,
        loss=F.mse_loss,
        fused_attention=True,
    ),
    Entry(
        name="tied_weights",
        kind="one parameter under two names",
        make=Tied,
        batch=tokens(3),
    ),
    Entry(
        name="nn.Embedding(max_norm=1)",
        kind="writes its weight in place",
        make=lambda: _words(max_norm=1.0),
        batch=tokens(3),
        no_vmap="one weight for all tasks cannot be written by each",
    ),
    Entry(
        name="nn.Embedding(sparse=True)",
        kind="sparse gradients",
        make=lambda: _words(sparse=True),
        batch=tokens(3),
        no_vmap="sparse gradients have no batching rule",
    ),
    Entry(
        name="nn.EmbeddingBag",
        kind="no second derivative",
        make=lambda: Bags("mean"),
        batch=_bags,
        no_second="bags",
    ),
]

"""Models of transformers: their outputs hold losses, caches and what else there is."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_entry import CLASSES, Entry, images

from metablocks.torchvision_import import torchvision_module

WORDS, LENGTH = 20, 5

CACHE = "the output holds a cache"

IN_FLOAT32 = 1e-6
"""Of a model that normalises, or takes its own loss, in float32 whatever its dtype: a last bit may round
the other way."""


def _make(kind: str, config: str, **settings: Any) -> nn.Module:
    torchvision_module("transforms")  # transformers imports it
    transformers = importlib.import_module("transformers")
    return getattr(transformers, kind)(getattr(transformers, config)(**settings))


def _bert() -> nn.Module:
    return _make(
        "BertForSequenceClassification",
        "BertConfig",
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )


def _gpt2() -> nn.Module:
    return _make(
        "GPT2LMHeadModel",
        "GPT2Config",
        vocab_size=WORDS,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )


def _llama() -> nn.Module:
    return _make(
        "LlamaForCausalLM",
        "LlamaConfig",
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8,
        use_cache=True,
    )


def _t5() -> nn.Module:
    return _make(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=WORDS,
        d_model=8,
        d_kv=4,
        d_ff=16,
        num_layers=1,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


def _vit() -> nn.Module:
    return _make(
        "ViTForImageClassification",
        "ViTConfig",
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
    )


def _mamba() -> nn.Module:
    return _make(
        "MambaForCausalLM",
        "MambaConfig",
        vocab_size=WORDS,
        hidden_size=8,
        state_size=4,
        num_hidden_layers=1,
        time_step_rank=2,
    )


def _mixtral() -> nn.Module:
    return _make(
        "MixtralForCausalLM",
        "MixtralConfig",
        vocab_size=WORDS,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        experts_implementation="eager",
        use_cache=False,
    )


def _own_loss(output: Any, target: Tensor) -> Tensor:
    """The loss that the model computes of its `labels`."""
    return output.loss


def _logits(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, target)


def _words(n: int, _: int) -> tuple[Any, Tensor]:
    words = torch.randint(1, WORDS, (n, LENGTH))
    mask = torch.ones(n, LENGTH, dtype=torch.long)
    mask[::2, LENGTH - 1 :] = 0
    target = torch.randint(0, CLASSES, (n,))
    return {"input_ids": words, "attention_mask": mask}, target


def _language(n: int, _: int) -> tuple[Any, Tensor]:
    words = torch.randint(1, WORDS, (n, LENGTH))
    return {"input_ids": words, "labels": words}, words


def _translation(n: int, _: int) -> tuple[Any, Tensor]:
    words, labels = torch.randint(1, WORDS, (2, n, LENGTH))
    return {"input_ids": words, "labels": labels}, labels


ENTRIES = [
    Entry(
        name="transformers.bert",
        kind="classification with a padding mask; the output is a ModelOutput",
        make=_bert,
        batch=_words,
        loss=_logits,
        fused_attention=True,
        no_vmap="looks into the padding mask: are all of it ones?",
    ),
    Entry(
        name="transformers.gpt2",
        kind="language model, tied embeddings, its own loss, a cache in the output",
        make=_gpt2,
        no_vmap_evaluate=CACHE,
        tolerance=IN_FLOAT32,
        batch=_language,
        loss=_own_loss,
        fused_attention=True,
    ),
    Entry(
        name="transformers.llama",
        kind="grouped queries, rotary positions, RMS norm in float32, use_cache=True",
        make=_llama,
        no_vmap_evaluate=CACHE,
        tolerance=IN_FLOAT32,
        batch=_language,
        loss=_own_loss,
        fused_attention=True,
    ),
    Entry(
        name="transformers.t5",
        kind="encoder and decoder, labels shifted in place, relative position buckets",
        make=_t5,
        no_vmap_evaluate=CACHE,
        tolerance=IN_FLOAT32,
        batch=_translation,
        loss=_own_loss,
        fused_attention=True,
    ),
    Entry(
        name="transformers.vit",
        kind="images, fields of the output that are None",
        make=_vit,
        batch=images(8),
        loss=_logits,
        fused_attention=True,
    ),
    Entry(
        name="transformers.mamba",
        kind="state space model: a scan in Python, log-parametrised weights",
        make=_mamba,
        no_vmap_evaluate=CACHE,
        batch=_language,
        loss=_own_loss,
    ),
    Entry(
        name="transformers.mixtral",
        kind="mixture of experts: each token goes to two of four, by index_add",
        make=_mixtral,
        tolerance=IN_FLOAT32,
        batch=_language,
        loss=_own_loss,
        fused_attention=True,
        no_vmap="looks into the data for which expert has a token",
    ),
]

"""A tiny model with a real tokenizer, for tests of the evaluation that need no particular answers."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from architectures import SMALL


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary["<eos>"] = len(vocabulary)
    tokenizer = Tokenizer(BPE(vocabulary, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


def byte_model() -> LlamaForCausalLM:
    """Random weights over bytes, large enough that what is evicted shows in the logits."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SMALL, "vocab_size": 257, "max_position_embeddings": 4096, "eos_token_id": 256, "pad_token_id": 256}
    )
    return LlamaForCausalLM(config).eval()

"""Folders of weights outside a run: a GPT-2 of ours, a GPT-NeoX and a tokenizer."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

from llmtrain.checkpoints.checkpoint import Origin
from llmtrain.checkpoints.gpt2_folder import Shape, save_weights
from llmtrain.config.schema import ModelConfig
from llmtrain.model.gpt import GPT

CONTEXT = 16


def write_ours(
    folder: Path, *, vocab_size: int = 264, eot: int = 256, block_size: int = CONTEXT
) -> GPT:
    """Write a GPT-2 with random weights, large enough for distinct probabilities."""
    config = ModelConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=vocab_size, bias=True)
    model = GPT(config, block_size, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() == 2 else 1)
    folder.mkdir(parents=True)
    save_weights(
        folder, dict(model.state_dict()), Shape(config, block_size, eot), Origin(3, 4, 0.1, "test")
    )
    return model.eval()


def write_neox(folder: Path, vocab_size: int = 264) -> GPTNeoXForCausalLM:
    """Write a GPT-NeoX (the architecture of Pythia) without tokenizer files."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=CONTEXT, initializer_range=0.3,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model


def write_tokenizer(folder: Path, text: str) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE trained on `text`, with an end-of-text token, next to the weights."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=264, initial_alphabet=alphabet, special_tokens=["<end>"]
    )
    backend.train_from_iterator([text], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    return tokenizer

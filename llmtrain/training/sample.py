"""What a model writes while it is trained: a few likeliest tokens after the beginning of the val split.

Why always the same beginning and no chance: the text of one evaluation is to be held against that of
another, and a resumed run must tell the same as one that was not interrupted.

    text = sample(model, data, tokens=64)
"""

import torch

from llmtrain.data.token_data import TokenData
from llmtrain.model.gpt import GPT
from llmtrain.model.tokenizer import load_tokenizer

PROMPT_TOKENS = 32


@torch.no_grad()
def sample(model: GPT, data: TokenData, tokens: int) -> str:
    """The beginning of the val split, `→`, and the likeliest `tokens` tokens after it, in float32.

    Args:
        model: whole, not in shards.
        data: whose val split begins the text, and whose tokenizer reads it.
        tokens: to write.
    """
    device = next(model.parameters()).device
    tokenizer, reader = load_tokenizer(data.tokenizer), data.reader("val")
    prompt = reader.read(0, min(PROMPT_TOKENS, len(reader), model.block_size))
    written = torch.tensor([prompt.tolist()], device=device)
    training = model.training
    model.eval()
    for _ in range(tokens):
        logits_V = model.logits(written[:, -model.block_size :])[0, -1, : tokenizer.vocab_size]
        written = torch.cat([written, logits_V.argmax().view(1, 1)], dim=1)
    model.train(training)
    ids = written[0].tolist()
    return f"{tokenizer.decode(ids[: len(prompt)])} → {tokenizer.decode(ids[len(prompt) :])}"

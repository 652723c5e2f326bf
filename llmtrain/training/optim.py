"""The optimizer: which weights decay, and AdamW over them.

Why: decay on embeddings and norms is a different recipe, so the rule is one line of the config and
this file, and the groups are in the order of the model's parameters on every machine.

    optimizer = build_optimizer(model, config.optimizer)
"""

from torch import nn
from torch.optim import AdamW

from llmtrain.config import OptimizerConfig


def decayed_parameters(model: nn.Module, rule: str) -> set[str]:
    """Names of the parameters that weight decay acts on.

    Args:
        model: the model; a tied matrix belongs to the embedding.
        rule: "linear": weights of linear layers (the paper); "matrices": every parameter of two
            dimensions or more, embeddings included (nanoGPT).
    """
    if rule == "matrices":
        return {name for name, parameter in model.named_parameters() if parameter.dim() >= 2}
    return {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101), fused where the device has it."""
    decayed = decayed_parameters(model, config.decay)
    named = list(model.named_parameters())
    groups = [
        {"params": [p for name, p in named if name in decayed], "weight_decay": config.weight_decay},
        {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)

"""GPT-2 with the parameter names of Hugging Face's `GPT2LMHeadModel`.

Why not transformers: training needs the fastest attention, initial weights that depend only on the
seed, and a chunked loss in float32.

Shape suffixes: B sequences, T tokens, C width, H heads, D width of a head, V vocabulary, N = B·T.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config.schema import ModelConfig
from llmtrain.model.chunk_sizes import MAX_MATERIALIZED_LENGTH, sequences_per_chunk
from llmtrain.model.cross_entropy import Collect, linear_cross_entropy

INIT_STD = 0.02
IGNORE = -1
"""Target value that the loss ignores."""


def materialized_attention(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, *, dropout_p: float, scale: float
) -> Tensor:
    """Compute causal attention with materialized attention weights (B, H, T, T).

    Without gradients, process a few sequences at a time to save memory.
    """
    H, T = q_BHTD.shape[1:3]
    few = sequences_per_chunk(q_BHTD.element_size() * H * T * T)
    if not torch.is_grad_enabled() and len(q_BHTD) > few:
        chunks = zip(*(torch.split(x, few) for x in (q_BHTD, k_BHTD, v_BHTD)), strict=True)
        parts = [materialized_attention(*c, dropout_p=dropout_p, scale=scale) for c in chunks]
        return torch.cat(parts)
    mask_TT = torch.full((T, T), -math.inf, dtype=q_BHTD.dtype, device=q_BHTD.device).triu(1)
    scores_BHTT = (q_BHTD * scale) @ k_BHTD.transpose(2, 3)
    weights_BHTT = scores_BHTT.add_(mask_TT).softmax(-1)  # backward does not need the scores
    return F.dropout(weights_BHTT, dropout_p) @ v_BHTD


class Attention(nn.Module):
    """Causal self-attention, with logits divided by i + 1 in layer i if configured."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        depth = layer + 1 if config.scale_attn_by_inverse_layer_idx else 1
        self.scale = 1.0 / (math.sqrt(config.n_embd // config.n_head) * depth)
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        B, T, C = x_BTC.shape
        qkv = self.c_attn(x_BTC).view(B, T, 3, self.n_head, C // self.n_head)
        q_BHTD, k_BHTD, v_BHTD = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.dropout if self.training else 0.0
        on_cpu = q_BHTD.device.type == "cpu"
        if on_cpu and q_BHTD.dtype == torch.bfloat16 and T <= MAX_MATERIALIZED_LENGTH:
            y_BHTD = materialized_attention(
                q_BHTD, k_BHTD, v_BHTD, dropout_p=dropout, scale=self.scale
            )
        else:
            y_BHTD = F.scaled_dot_product_attention(
                q_BHTD, k_BHTD, v_BHTD, dropout_p=dropout, is_causal=True, scale=self.scale
            )
        y: Tensor = self.resid_dropout(self.c_proj(y_BHTD.transpose(1, 2).reshape(B, T, C)))
        return y


class MLP(nn.Module):
    """Two linear layers with GELU between them, in GPT-2's tanh approximation or exact."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)
        self.approximate = "tanh" if config.activation == "gelu_new" else "none"

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        hidden_BTC = F.gelu(self.c_fc(x_BTC), approximate=self.approximate)
        y: Tensor = self.dropout(self.c_proj(hidden_BTC))
        return y


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP with residual connections."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.recompute = False
        """Activation checkpointing: save only the input and recompute the rest for backward."""

    def forward(self, x_BTC: Tensor) -> Tensor:
        """Map (B, T, C) to (B, T, C)."""
        if self.recompute and self.training:
            y: Tensor = checkpoint(self._layers, x_BTC, use_reentrant=False)
            return y
        return self._layers(x_BTC)

    def _layers(self, x_BTC: Tensor) -> Tensor:
        x_BTC = x_BTC + self.attn(self.ln_1(x_BTC))
        y: Tensor = x_BTC + self.mlp(self.ln_2(x_BTC))
        return y


class Transformer(nn.Module):
    """Token and position embeddings, the blocks and the final layer norm."""

    def __init__(self, config: ModelConfig, block_size: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Map token ids (B, T) to hidden states (B, T, C)."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        # On a CPU, a sparse gradient avoids adding a mostly zero matrix to the tied weight's.
        sparse = tokens_BT.device.type == "cpu" and not torch.compiler.is_compiling()
        embedded_BTC = F.embedding(tokens_BT, self.wte.weight, sparse=sparse)
        x_BTC = self.drop(embedded_BTC + self.wpe(positions_T))
        for block in self.h:
            x_BTC = block(x_BTC)
        y: Tensor = self.ln_f(x_BTC)
        return y


class GPT(nn.Module):
    """GPT-2 with the output layer tied to the token embedding."""

    def __init__(self, config: ModelConfig, block_size: int, seed: int | None = None) -> None:
        """Build the model; without a `seed`, keep torch's default initialization for loading."""
        super().__init__()
        self.config = config
        self.block_size = block_size
        self.fused_loss = False
        """Use torch.compile for the loss."""
        self.transformer = Transformer(config, block_size)
        if seed is not None:
            parameters = dict(self.named_parameters())
            with torch.no_grad():
                for name, value in self.initial_weights(seed):
                    parameters[name].copy_(value)

    def initial_weights(self, seed: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the name and unsharded initial value, on the CPU, of each parameter.

        N(0, 0.02²); residual projections N(0, 0.02²/(2L)); biases 0; norms 1 (Radford et al. 2019).
        """
        generator = torch.Generator().manual_seed(seed)
        residual_std = INIT_STD / math.sqrt(2 * self.config.n_layer)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                yield name, torch.zeros(parameter.shape)
            elif parameter.dim() == 1:
                yield name, torch.ones(parameter.shape)
            else:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                yield name, torch.empty(parameter.shape).normal_(0.0, std, generator=generator)

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Return the next-token logits (B, T, V) of token ids (B, T)."""
        return F.linear(self.transformer(tokens_BT), self.transformer.wte.weight)

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, collect: Collect | None = None
    ) -> Tensor:
        """Return the mean cross-entropy of the targets in nats, float32, shape ().

        Without gradients, the loss of each target is passed to `collect`.
        """
        hidden_NC = self.transformer(tokens_BT).flatten(0, 1)
        weight_VC, targets_N = self.transformer.wte.weight, targets_BT.reshape(-1)
        fused = self.fused_loss and self.training
        return linear_cross_entropy(
            hidden_NC, weight_VC, targets_N, ignore=IGNORE, fused=fused, collect=collect
        )

    def n_parameters(self) -> int:
        """Return the number of parameters, counting the tied matrix once."""
        return sum(parameter.numel() for parameter in self.parameters())

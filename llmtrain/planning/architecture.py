"""Parameters and FLOPs of a GPT-2 by formula: what `llmtrain/model.py` builds, counted without building it.

Why: a plan for a model of seven billion parameters should not need the memory for one, nor torch.

    architecture = Architecture(config.model, config.data.block_size); architecture.parameters
"""

from dataclasses import dataclass

from llmtrain.config.schema import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """Counts of one model; C is the width, V the vocabulary, T the block size, L the layers."""

    model: ModelConfig
    block_size: int

    @property
    def token_embedding(self) -> int:
        """V·C, tied to the output head."""
        return self.model.vocab_size * self.model.n_embd

    @property
    def position_embedding(self) -> int:
        """T·C."""
        return self.block_size * self.model.n_embd

    @property
    def block(self) -> int:
        """Parameters of one block: 12·C² in four linear layers, and the vectors."""
        return 12 * self.model.n_embd**2 + 2 * self.model.n_embd + self._biases(block=True)

    @property
    def final_norm(self) -> int:
        """Parameters of the last layer norm."""
        return self.model.n_embd + self._biases(block=False)

    @property
    def parameters(self) -> int:
        """All parameters, the tied matrix counted once."""
        return self.token_embedding + self.position_embedding + self.without_embeddings

    @property
    def without_embeddings(self) -> int:
        """All but the two embeddings."""
        return self.model.n_layer * self.block + self.final_norm

    @property
    def root(self) -> int:
        """All but the blocks."""
        return self.parameters - self.model.n_layer * self.block

    @property
    def matrices(self) -> int:
        """Weights of the linear layers: 12·C² a block."""
        return 12 * self.model.n_embd**2 * self.model.n_layer

    @property
    def multiplied(self) -> int:
        """Weights of the blocks that autocast copies to bfloat16: linear layers with their biases."""
        width = self.model.n_embd
        return self.model.n_layer * (12 * width**2 + (9 * width if self.model.bias else 0))

    @property
    def stored(self) -> int:
        """Numbers in a folder of weights, where Hugging Face's GPT-2 has zeros for biases we lack."""
        if self.model.bias:
            return self.parameters
        return self.parameters + self.model.n_embd * (11 * self.model.n_layer + 1)

    def flops_per_token(self, length: int | None = None) -> int:
        """6N + 12·L·C·T to train on one token, as `GPT.flops_per_token` (PaLM, 2022, appendix B).

        T is `length`, by default the block size.
        """
        matrices = self.parameters - self.position_embedding
        return 6 * matrices + 12 * self.model.n_layer * self.model.n_embd * (
            length or self.block_size
        )

    def _biases(self, *, block: bool) -> int:
        """Of one block: attention 3C + C, MLP 4C + C, norms 2C; of the last norm: C."""
        return (11 if block else 1) * self.model.n_embd if self.model.bias else 0

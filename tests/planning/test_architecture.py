"""Counts by formula equal those of the built model."""

from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.schema import ModelConfig
from llmtrain.model.gpt import GPT
from llmtrain.planning.sizes import Architecture


@settings(max_examples=25)
@given(
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 16),
    st.integers(1, 300),
    st.integers(1, 64),
    st.booleans(),
)
def test_counts_equal_those_of_the_model(
    layers: int, heads: int, head: int, vocabulary: int, block: int, bias: bool
) -> None:
    config = ModelConfig(
        n_layer=layers, n_head=heads, n_embd=heads * head, vocab_size=vocabulary, bias=bias
    )
    counted, model = Architecture(config, block), GPT(config, block)
    assert counted.parameters == model.n_parameters()
    positions = model.transformer.wpe.weight.numel()
    multiplied = 6 * (model.n_parameters() - positions)
    assert counted.flops_per_token() == multiplied + 12 * layers * config.n_embd * block
    assert counted.flops_per_token(8) == multiplied + 12 * layers * config.n_embd * 8
    embeddings = model.transformer.wte.weight.numel() + positions
    assert counted.without_embeddings == counted.parameters - embeddings
    assert counted.block == sum(p.numel() for p in model.transformer.h[0].parameters())

"""The tokenizer that is built for transformers gives the ids of ours."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.errors import UserError
from llmtrain.model.tokenizer import TOKENIZERS, fast_tokenizer, load_tokenizer, tokenizer_for_eot

PIECES = st.sampled_from(
    ["the", " don't", "'LL", " 12345", "\n\n", "  ", "\t", "<|endoftext|>", "é", "😀", "　"]
)
TEXTS = st.lists(PIECES | st.text(max_size=8), max_size=12).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300)
@given(text=TEXTS)
def test_the_same_ids_and_text(name: str, text: str) -> None:
    ours = load_tokenizer(name)
    theirs = fast_tokenizer(ours)
    ids = theirs.encode(text, add_special_tokens=False)
    assert ids == ours.encode(text).tolist()
    assert theirs.decode(ids) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_end_of_text(name: str) -> None:
    ours = load_tokenizer(name)
    assert fast_tokenizer(ours).eos_token_id == fast_tokenizer(ours).bos_token_id == ours.eot
    assert tokenizer_for_eot(ours.eot, "a folder") is ours
    with pytest.raises(UserError, match="neither of the tokenizers gpt2, byte"):
        tokenizer_for_eot(7, "a folder")

"""Tokenizers against independent references, and their Hugging Face files."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from llmtrain.errors import RunFailed, UserError
from llmtrain.model import tokenizer as module
from llmtrain.model.tokenizer import (
    END_OF_TEXT,
    TOKENIZERS,
    fast_tokenizer,
    load_tokenizer,
    split_text,
    tokenizer_files,
    tokenizer_for_eot,
)

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
"""OpenAI's pattern of 2019; tiktoken uses another one."""


TEXTS = st.lists(
    st.sampled_from(
        ["the", " don't", "'LL", " 12345", "\n\n", "  ", "\t", "<|endoftext|>", "é", "😀", "　"]
    )
    | st.text(max_size=8),
    max_size=12,
).map("".join)


def textbook_bpe(text: str) -> list[int]:
    """Return the ids of textbook byte-pair encoding: repeatedly merge the lowest-ranked pair."""
    regex = pytest.importorskip("regex")
    ranks = module._gpt2_ranks()
    ids = []
    for word in regex.findall(GPT2_PATTERN, text):
        parts = [bytes([byte]) for byte in word.encode()]
        while len(parts) > 1:
            pairs = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            best = min(pairs)
            if best == len(ranks):
                break
            i = pairs.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_published_ids() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert gpt2.encode("Hello, my dog is cute").tolist() == [15496, 11, 616, 3290, 318, 13779]
    assert gpt2.encode("Hello").dtype == np.uint16
    assert (gpt2.eot, gpt2.vocab_size) == (50256, 50257)


def test_gpt2_equals_textbook_bpe_on_real_text(real_texts: list[str]) -> None:
    gpt2 = load_tokenizer("gpt2")
    for text in real_texts[::60]:
        assert gpt2.encode(text).tolist() == textbook_bpe(text)


@pytest.mark.slow
@settings(max_examples=50)
@given(st.text())
def test_gpt2_equals_textbook_bpe_on_any_text(text: str) -> None:
    ids = load_tokenizer("gpt2").encode(text)
    assert ids.tolist() == textbook_bpe(text)


def test_special_tokens_in_text_are_ordinary_text() -> None:
    for name in ("gpt2", "byte"):
        tokenizer = load_tokenizer(name)
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == "a<|endoftext|>b"


def test_byte_tokenizer() -> None:
    byte = load_tokenizer("byte")
    assert byte.encode("aé").tolist() == [97, 0xC3, 0xA9]
    assert (byte.eot, byte.vocab_size) == (256, 257)
    assert byte.encode("").tolist() == []


@pytest.mark.parametrize("name", ["gpt2", "byte"])
@given(text=st.text())
def test_round_trip_and_byte_counts(name: str, text: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes([*ids, tokenizer.eot]) == text.encode()
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes()[tokenizer.eot] == 0


@pytest.mark.parametrize("name", ["gpt2", "byte"])
def test_lone_surrogate_becomes_the_replacement_character(name: str) -> None:
    tokenizer = load_tokenizer(name)
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\ufffdb"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


@pytest.mark.parametrize("wrong", [-1, 50257, 50303])
def test_id_outside_the_vocabulary_is_rejected(wrong: int) -> None:
    with pytest.raises(UserError, match=f"token id {wrong} is outside the vocabulary of gpt2"):
        load_tokenizer("gpt2").decode([1, wrong])


def test_incomplete_character_decodes_to_the_replacement() -> None:
    assert load_tokenizer("byte").decode([0xC3]) == "\ufffd"


def test_long_whitespace_is_split() -> None:
    # tiktoken alone overflows the stack of its regular expression here.
    gpt2 = load_tokenizer("gpt2")
    text = "a" + " " * 1_500_000 + "b\n\n" + "\u3000" * 1_500_000 + "é" + "\n" * 1_500_000
    assert gpt2.decode(gpt2.encode(text)) == text
    short = "a" + " " * 30_000 + "b\n\n" + "\u3000" * 30_000 + "\u3000\u4e2d"
    parts = [gpt2.encode(str(part, "utf-8")) for part in split_text(short.encode(), 10_000)]
    assert len(parts) == 3
    assert np.concatenate(parts).tolist() == gpt2.encode(short).tolist()


@settings(max_examples=200)
@given(text=st.text(alphabet=" \n\tab'12.,é中\u3000\xa0\x1c"), size=st.integers(1, 8))
def test_splitting_preserves_tokens(text: str, size: int) -> None:
    gpt2 = load_tokenizer("gpt2")
    parts = [bytes(part).decode() for part in split_text(text.encode(), size)]
    assert "".join(parts) == text
    assert [i for part in parts for i in gpt2.encode(part)] == gpt2.encode(text).tolist()


def test_splitting_real_text_preserves_tokens(real_texts: list[str]) -> None:
    text = "\n".join(real_texts[:40])
    parts = list(split_text(text.encode(), 1000))
    assert len(parts) > 50
    gpt2 = load_tokenizer("gpt2")
    ids = np.concatenate([gpt2.encode(bytes(part).decode()) for part in parts])
    assert np.array_equal(ids, gpt2.encode(text))


def test_unknown_name_is_rejected() -> None:
    with pytest.raises(UserError, match="unknown tokenizer 'gpt3'") as caught:
        load_tokenizer("gpt3")
    assert "gpt2, byte" in caught.value.hint


def test_damaged_ranks_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GPT2_RANKS_SHA256", "0" * 64)
    with pytest.raises(RunFailed, match="is damaged"):
        module._gpt2_ranks()


def test_tokenizers_have_different_hashes() -> None:
    assert load_tokenizer("gpt2").sha256 == module.GPT2_RANKS_SHA256
    assert load_tokenizer("byte").sha256 != load_tokenizer("gpt2").sha256


@cache
def backend(name: str) -> Backend:
    return Backend.from_str(tokenizer_files(load_tokenizer(name), 64)["tokenizer.json"])


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=300)
@given(text=TEXTS)
def test_hugging_face_tokenizers_equal_ours(name: str, text: str) -> None:
    ours = load_tokenizer(name)
    fast = fast_tokenizer(ours)
    ids = ours.encode(text).tolist()
    assert fast.encode(text, add_special_tokens=False) == ids
    assert fast.decode(ids) == text
    if END_OF_TEXT not in text:
        assert backend(name).encode(text).ids == ids
    assert backend(name).decode(ids) == text


def test_tokenizer_files_contain_end_of_text() -> None:
    assert backend("gpt2").encode("a<|endoftext|>").ids == [64, 50256]
    assert backend("byte").encode("a<|endoftext|>").ids == [97, 256]
    merges = tokenizer_files(load_tokenizer("gpt2"), 64)["merges.txt"].splitlines()
    assert (merges[:4], len(merges)) == (["#version: 0.2", "Ġ t", "Ġ a", "h e"], 50_001)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_end_of_text_identifies_the_tokenizer(name: str) -> None:
    ours = load_tokenizer(name)
    assert fast_tokenizer(ours).eos_token_id == fast_tokenizer(ours).bos_token_id == ours.eot
    assert tokenizer_for_eot(ours.eot, "a folder") is ours
    with pytest.raises(UserError, match="neither of the tokenizers gpt2, byte"):
        tokenizer_for_eot(7, "a folder")

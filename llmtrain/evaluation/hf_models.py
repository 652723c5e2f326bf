"""Causal language models that are not our GPT-2, with the tokenizer of their folder.

Why: a loss means something beside that of a public model on the same text. `transformers` computes any
causal model; windows, sums and results stay those of our own. Code that a folder brings is never run.

    model = load_causal(Path("pythia-160m")); encoding = encoding_of(Path("pythia-160m"))
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.checkpoints.checkpoint import CONFIG_FILE
from llmtrain.checkpoints.gpt2_folder import load_model, load_shape
from llmtrain.data.token_data import TokenData
from llmtrain.errors import UserError
from llmtrain.model.gpt import GPT, IGNORE
from llmtrain.model.tokenizer import has_same_ids, load_tokenizer, tokenizer_for_eot
from llmtrain.storage.json_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LONGEST_WINDOW = 2048
"""Tokens of context that a model of others is given at most: Pythia's, and what lm-eval takes for granted."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_MOST_LAYERS = 10_000
"""More than any model has; even without weights, each takes time to build."""
_PROBE = 4096
"""Tokens that are encoded again to see whether two tokenizers are one."""

Ids = npt.NDArray[np.int64]


class HFModel(nn.Module):
    """A model of `transformers`, called as our own is."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.block_size = min(_context(model.config), LONGEST_WINDOW)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean negative log-likelihood of the targets in nats, float32, shape (); see `GPT.forward`."""
        logits_BTV = self.model(tokens_BT, use_cache=False).logits
        return F.cross_entropy(
            logits_BTV.float().view(-1, logits_BTV.shape[-1]),
            targets_BT.reshape(-1),
            ignore_index=IGNORE,
        )


@dataclass(frozen=True)
class Encoding:
    """Text to the ids of one model."""

    encode: Callable[[str], Ids]
    """Ids of a text, without special tokens."""
    eot: int
    """The id that stands before a text and between two."""


class IdArray:
    """Ids in memory, read as a file of tokens is."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, start: int, length: int) -> Ids:
        """Ids `start` to `start + length`."""
        return self._ids[start : start + length]


@dataclass(frozen=True)
class Reencoded:
    """The text of a split in the ids of another tokenizer."""

    ids: IdArray
    bytes: int
    """Of text."""


def is_foreign(folder: Path) -> bool:
    """Whether a folder of weights holds another model than GPT-2."""
    return bool(read_json(folder / CONFIG_FILE).get("model_type", "gpt2") != "gpt2")


def load_causal(folder: Path) -> GPT | HFModel:
    """The model in a folder of weights, on the CPU in float32, in evaluation mode.

    Raises:
        UserError: it is damaged, no causal language model, or needs code of its own.
    """
    return HFModel(load_transformers(folder)).eval() if is_foreign(folder) else load_model(folder)


def load_transformers(folder: Path) -> "PreTrainedModel":
    """The model in a folder of weights as `transformers` computes it, on the CPU in float32.

    Raises:
        UserError: transformers is missing, or cannot load it.
    """
    transformers = _transformers()
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **options)
        _require_fit(folder, config)
        model: PreTrainedModel
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **options
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise _unloadable(folder, "a causal language model", error) from None
    if missing := sorted(loaded["missing_keys"]):
        raise _misfit(folder, f"{len(missing)} tensors are missing, such as {missing[0]}")
    return model


def _require_fit(folder: Path, config: Any) -> None:
    """Raise a UserError if a model is larger than its files: before anything is built."""
    transformers = _transformers()
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > _MOST_LAYERS:
        raise _misfit(folder, f"the config asks for {layers} layers")
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    held = sum(
        path.stat().st_size
        for pattern in ("*.safetensors", "*.bin")
        for path in folder.glob(pattern)
    )
    if wanted > held:  # a parameter takes a byte at the least
        raise _misfit(
            folder, f"the config asks for {wanted:,} parameters, the files hold {held:,} bytes"
        )


def _misfit(folder: Path, what: str) -> UserError:
    return UserError(f"{folder}: {what}", hint="config.json and the weights do not belong together")


def load_tokenizer_files(folder: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer in a folder of weights; None where it has none.

    Raises:
        UserError: transformers is missing, or cannot load it.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    transformers = _transformers()
    try:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # its Rust half raises Exception itself
        raise _unloadable(folder, "a tokenizer", error) from None
    return tokenizer


def own_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """The tokenizer for the model in a folder; None where it is one of ours.

    Raises:
        UserError: it is not GPT-2 and has no tokenizer files; or see `load_tokenizer_files`.
    """
    own = load_tokenizer_files(folder)
    if own is None and is_foreign(folder):
        raise UserError(
            f"{folder} has no tokenizer files, so text cannot be encoded for it",
            hint="put its tokenizer.json beside its weights",
        )
    return own


def encoding_of(folder: Path) -> Encoding:
    """How the model in a folder wants text: by the folder's own tokenizer files, else by ours.

    Raises:
        UserError: it has no tokenizer files and is of neither of ours.
    """
    own = own_tokenizer(folder)
    if own is None:
        ours = tokenizer_for_eot(load_shape(folder).eot, folder)
        return Encoding(lambda text: ours.encode(text).astype(np.int64), ours.eot)
    eot = own.eos_token_id if own.eos_token_id is not None else own.bos_token_id
    if not isinstance(eot, int):
        raise UserError(
            f"the tokenizer of {folder} has neither an end-of-text nor a beginning-of-text token",
            hint="name them in its tokenizer_config.json",
        )
    return Encoding(
        lambda text: np.array(
            own.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64
        ),
        eot,
    )


def reencoded(folder: Path, data: TokenData, split: str, limit: int) -> Reencoded | None:
    """The text of the first `limit` tokens of a split in the ids of a folder's own tokenizer.

    None where the folder has no tokenizer files or they give the ids that the split holds; of a GPT-2, these files
    and the id of its end-of-text token tell, without transformers.
    """
    ours = load_tokenizer(data.tokenizer)
    alike = (
        not is_foreign(folder) and load_shape(folder).eot == ours.eot and has_same_ids(folder, ours)
    )
    if alike or load_tokenizer_files(folder) is None:
        return None
    encoding, reader = encoding_of(folder), data.reader(split)
    probe = reader.read(0, min(_PROBE, len(reader))).astype(np.int64)
    again, _ = _encode_documents(probe, data, encoding)
    if np.array_equal(again[1 : len(probe) // 2 + 1], probe[: len(probe) // 2]):
        return None
    ids, n_bytes = _encode_documents(reader.read(0, limit).astype(np.int64), data, encoding)
    return Reencoded(IdArray(ids), n_bytes)


def require_ids(folder: Path, ids: Ids, model: GPT | HFModel) -> None:
    """Raise a UserError if the tokenizer of a folder gives ids that its model has not."""
    if ids.max() >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} gives the id {ids.max():,}, the model has {model.config.vocab_size:,}",
            hint="the tokenizer is that of another model",
        )


def _encode_documents(tokens: Ids, data: TokenData, encoding: Encoding) -> tuple[Ids, int]:
    """Documents joined and preceded by the end-of-text token, and their bytes of text."""
    tokenizer = load_tokenizer(data.tokenizer)
    parts, n_bytes = [np.array([encoding.eot])], 0
    for i, document in enumerate(np.split(tokens, np.flatnonzero(tokens == data.eot))):
        text = tokenizer.decode_bytes(document)
        parts += [np.array([encoding.eot])] * (i > 0)
        parts.append(encoding.encode(text.decode("utf-8", errors="replace")))
        n_bytes += len(text)
    return np.concatenate(parts), n_bytes


def _context(config: Any) -> int:
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if isinstance(length := getattr(config, name, None), int):
            return length
    return LONGEST_WINDOW  # no table of positions ends it


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise UserError(
            "the package transformers is not installed", hint="pip install 'llmtrain[eval]'"
        ) from None
    logging: Any = transformers.logging  # which has no types
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def _unloadable(folder: Path, what: str, error: Exception) -> UserError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return UserError(
        f"transformers finds no such thing as {what} in {folder}: {reason}",
        hint="a folder that brings its own code is not run; is config.json that of a causal language model?",
    )

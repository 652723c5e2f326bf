"""Causal language models other than our GPT-2, loaded with transformers, and their tokenizers.

transformers computes the logits; windows, sums and results are the same as for our own models.
Code in a model's folder is never run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmtrain.checkpoints.checkpoint import CONFIG_FILE
from llmtrain.checkpoints.gpt2_folder import load_model, load_shape
from llmtrain.data.token_data import TokenData
from llmtrain.errors import UserError
from llmtrain.model.cross_entropy import Collect, cross_entropy
from llmtrain.model.gpt import GPT, IGNORE
from llmtrain.model.tokenizer import has_same_ids, load_tokenizer, tokenizer_for_eot
from llmtrain.storage.integrity import recorded_digests
from llmtrain.storage.json_files import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_CONTEXT = 2048
"""Longest context given to these models: that of Pythia, and the default of lm-eval."""

_LOCAL: Any = {"local_files_only": True, "trust_remote_code": False}
_MAX_LAYERS = 10_000
"""Upper limit on layers: building a layer takes time even without weights."""
_PROBE = 4096
"""Tokens that are re-encoded to compare two tokenizers."""

Ids = npt.NDArray[np.int64]


class HFModel(nn.Module):
    """A transformers model with the interface of `GPT`."""

    def __init__(self, model: "PreTrainedModel") -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        names = ("n_positions", "max_position_embeddings", "n_ctx")
        known = [getattr(model.config, name, None) for name in names]
        lengths = [length for length in known if isinstance(length, int)]
        self.block_size = min([*lengths[:1], MAX_CONTEXT])

    def forward(
        self, tokens_BT: Tensor, targets_BT: Tensor, collect: Collect | None = None
    ) -> Tensor:
        """Return the mean negative log-likelihood in nats, float32, shape (); see `GPT.forward`."""
        logits_BTV = self.model(tokens_BT, use_cache=False).logits
        logits_NV = logits_BTV.view(-1, logits_BTV.shape[-1])
        return cross_entropy(logits_NV, targets_BT.reshape(-1), IGNORE, "mean", collect)


@dataclass(frozen=True)
class Encoding:
    """The text encoding of one model, without special tokens, and its end-of-text id."""

    encode: Callable[[str], Ids]
    eot: int


class IdArray:
    """Ids in memory, with the interface of a token file."""

    def __init__(self, ids: Ids) -> None:
        self._ids = ids

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, start: int, length: int) -> Ids:
        """Return ids `start` to `start + length`."""
        return self._ids[start : start + length]


def is_hf(folder: Path) -> bool:
    """Return whether a folder contains a model other than GPT-2."""
    return bool(read_json(folder / CONFIG_FILE).get("model_type", "gpt2") != "gpt2")


def load_causal(folder: Path) -> GPT | HFModel:
    """Load the model in a folder, on the CPU in float32, in evaluation mode."""
    return HFModel(load_transformers(folder)).eval() if is_hf(folder) else load_model(folder)


def load_transformers(folder: Path) -> "PreTrainedModel":
    """Load the model in a folder with transformers, on the CPU in float32; check its digests."""
    recorded_digests(folder)  # before transformers maps the files into memory
    model: PreTrainedModel
    with _transformers(folder, "a causal language model") as transformers:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        _check_size(folder, config, transformers)
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, **_LOCAL
        )
        if missing := sorted(loaded["missing_keys"]):
            raise _misfit(folder, f"{len(missing)} tensors are missing, such as {missing[0]}")
    return model


def _check_size(folder: Path, config: Any, transformers: Any) -> None:
    """Raise a UserError if the config describes more parameters than the files can contain."""
    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or layers > _MAX_LAYERS:
        raise _misfit(folder, f"the config asks for {layers} layers")
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    files = (*folder.glob("*.safetensors"), *folder.glob("*.bin"))
    size = sum(path.stat().st_size for path in files)
    if wanted > size:  # a parameter takes at least one byte
        problem = f"the config asks for {wanted:,} parameters, the files have {size:,} bytes"
        raise _misfit(folder, problem)


def _misfit(folder: Path, problem: str) -> UserError:
    return UserError(f"{folder}: {problem}", hint="config.json and the weights do not match")


def own_tokenizer(folder: Path) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer files in a folder; None if llmtrain's own tokenizer has the same ids."""
    if _has_our_ids(folder):
        return None
    if not _has_tokenizer_files(folder):
        if not is_hf(folder):
            return None
        raise UserError(f"{folder} has no tokenizer files", hint="add the model's tokenizer.json")
    with _transformers(folder, "a tokenizer") as transformers:
        tokenizer: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
            folder, **_LOCAL
        )
    return tokenizer


def _has_our_ids(folder: Path) -> bool:
    """Return whether llmtrain wrote the folder, and its tokenizer files produce our ids.

    Our tokenizer is faster, and reads `<|endoftext|>` in a text as ordinary text.
    """
    if "llmtrain" not in read_json(folder / CONFIG_FILE):
        return False
    return has_same_ids(folder, tokenizer_for_eot(load_shape(folder).eot, folder))


def _has_tokenizer_files(folder: Path) -> bool:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json")
    return any((folder / name).is_file() for name in names)


def encoding_of(folder: Path) -> Encoding:
    """Return the encoding of the model in a folder, from its tokenizer files or our tokenizers."""
    own = own_tokenizer(folder)
    if own is None:
        ours = tokenizer_for_eot(load_shape(folder).eot, folder)
        return Encoding(lambda text: ours.encode(text).astype(np.int64), ours.eot)
    eot = own.eos_token_id if own.eos_token_id is not None else own.bos_token_id
    if not isinstance(eot, int):
        raise UserError(
            f"the tokenizer of {folder} has neither an end-of-text nor a beginning-of-text token",
            hint="name one of them in its tokenizer_config.json",
        )

    def encode(text: str) -> Ids:
        return np.array(own.encode(text, add_special_tokens=False, verbose=False), dtype=np.int64)

    return Encoding(encode, eot)


def reencode(folder: Path, data: TokenData, split: str, limit: int) -> tuple[IdArray, int] | None:
    """Encode the first `limit` tokens of a split with the tokenizer in a folder.

    Return the ids and the bytes of text, or None if the folder uses the same ids as the
    split. For a GPT-2, a comparison of the tokenizer files decides this without transformers.
    """
    ours = load_tokenizer(data.tokenizer)
    same = not is_hf(folder) and load_shape(folder).eot == ours.eot and has_same_ids(folder, ours)
    if same or not _has_tokenizer_files(folder):
        return None
    encoding, reader = encoding_of(folder), data.reader(split)
    probe = reader.read(0, min(_PROBE, len(reader))).astype(np.int64)
    again, _ = _encode_documents(probe, data, encoding)
    if np.array_equal(again[1 : len(probe) // 2 + 1], probe[: len(probe) // 2]):
        return None
    ids, n_bytes = _encode_documents(reader.read(0, limit).astype(np.int64), data, encoding)
    return IdArray(ids), n_bytes


def _encode_documents(tokens: Ids, data: TokenData, encoding: Encoding) -> tuple[Ids, int]:
    """Return the re-encoded documents, preceded and separated by end-of-text, and their bytes."""
    tokenizer = load_tokenizer(data.tokenizer)
    eot, n_bytes = np.array([encoding.eot]), 0
    parts = []
    for document in np.split(tokens, np.flatnonzero(tokens == data.eot)):
        text = tokenizer.decode_bytes(document)
        parts += [eot, encoding.encode(text.decode("utf-8", errors="replace"))]
        n_bytes += len(text)
    return np.concatenate(parts), n_bytes


def require_ids(folder: Path, ids: Ids, model: GPT | HFModel) -> None:
    """Raise a UserError if an id is outside the model's vocabulary."""
    if ids.max() >= model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {folder} produces id {ids.max():,}, "
            f"but the vocabulary of the model has {model.config.vocab_size:,}",
            hint="replace it with the tokenizer of the model",
        )


@contextmanager
def _transformers(folder: Path, kind: str) -> Iterator[Any]:
    """Provide transformers, and raise a UserError if it is missing or cannot load `kind`."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is missing", hint="pip install 'llmtrain[eval]'") from None
    logging: Any = transformers.logging  # untyped
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield transformers
    except UserError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"transformers could not load {kind} from {folder}: {reason}",
            hint="check config.json; a folder with its own code is not run",
        ) from None

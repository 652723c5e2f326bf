"""Options of `llmtrain prepare`: their types, help texts, defaults and limits, without heavy imports."""

from dataclasses import dataclass
from typing import Annotated, Literal

from typing_extensions import Doc

from llmtrain.errors import UserError

MAX_TARGET_TOKENS = 2**30 - 1
"""Largest `shard_tokens`. A shard's header counts up to 2^31 - 1, and its last document overruns."""


@dataclass(frozen=True)
class PrepareOptions:
    """Options of one preparation. None of `workers`, `engine` and `ray_address` affects the output.

    Raises:
        UserError: an option is out of range, or two options exclude each other.
    """

    tokenizer: Annotated[
        Literal["gpt2", "byte"], Doc("GPT-2's BPE (50,257 ids) or bytes (257 ids).")
    ] = "gpt2"
    val_fraction: Annotated[
        float, Doc("Share of documents for validation, rounded up; 0 for none.")
    ] = 0.0005
    seed: Annotated[int, Doc("Random seed of the train/validation split.")] = 2357
    shard_tokens: Annotated[
        int, Doc("Tokens in a shard; a shard ends with the document that reaches them.")
    ] = 100_000_000
    workers: Annotated[int | None, Doc("Tokenizer threads; the output is the same.")] = None
    engine: Annotated[
        Literal["local", "ray"], Doc("Local threads or a Ray cluster; the output is the same.")
    ] = "local"
    ray_address: Annotated[
        str | None, Doc("Ray cluster: HOST:PORT, or auto for the one on this machine.")
    ] = None
    text_field: Annotated[str, Doc("Field or column that contains the text.")] = "text"
    limit_documents: Annotated[int | None, Doc("Read only the first COUNT documents.")] = None

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise UserError(
                f"val fraction {self.val_fraction} is outside 0 <= fraction < 1",
                hint="0.0005 takes one document in 2,000; 0 takes none",
            )
        if not 0 <= self.seed < 2**32:
            raise UserError(
                f"seed {self.seed} is outside 0 to {2**32 - 1}", hint="nanoGPT uses 2357"
            )
        if not 1 <= self.shard_tokens <= MAX_TARGET_TOKENS:
            raise UserError(
                f"{self.shard_tokens:,} tokens per shard is outside 1 to {MAX_TARGET_TOKENS:,}",
                hint="use the default, 100M",
            )
        if self.workers is not None and self.workers < 1:
            raise UserError(
                f"{self.workers} workers: at least 1 is needed",
                hint="omit --workers for one thread per core",
            )
        if self.limit_documents is not None and self.limit_documents < 1:
            raise UserError(
                f"a limit of {self.limit_documents} documents leaves nothing to prepare",
                hint="pass at least 1",
            )
        self._check_engine()

    def _check_engine(self) -> None:
        if self.engine not in ("local", "ray"):
            raise UserError(f"unknown engine {self.engine!r}", hint="choose one of: local, ray")
        if self.engine == "ray" and self.workers is not None:
            raise UserError(
                "--workers counts local threads, not those of a cluster",
                hint="omit --workers with --engine ray",
            )
        if self.engine != "ray" and self.ray_address is not None:
            raise UserError("--ray-address needs --engine ray", hint="add it, or omit the address")

"""Options of `llmtrain prepare`: types, help texts, defaults and limits, without heavy imports."""

from dataclasses import dataclass
from typing import Annotated, Literal

from typing_extensions import Doc

from llmtrain.errors import UserError

MAX_SHARD_TOKENS = 2**30 - 1
"""Largest `shard_tokens`, half of a header's limit, because the last document may overrun it."""

MAX_WORKERS = 1024
"""Largest `workers`: each one keeps a few megabytes of encoded text."""


@dataclass(frozen=True)
class PrepareOptions:
    """Options of one preparation; invalid ones raise a UserError.

    The output does not depend on `workers`, `engine` and `ray_address`.
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
        limit, shard_tokens = self.limit_documents, self.shard_tokens
        ray, address = self.engine == "ray", self.ray_address
        problems = {
            f"--val-fraction {self.val_fraction} is not in [0, 1)": not 0 <= self.val_fraction < 1,
            f"--seed {self.seed} is not between 0 and 2^32 - 1": not 0 <= self.seed < 2**32,
            f"--shard-tokens {shard_tokens:,} is not between 1 and {MAX_SHARD_TOKENS:,}": (
                not 1 <= shard_tokens <= MAX_SHARD_TOKENS
            ),
            f"--workers {self.workers} is not between 1 and {MAX_WORKERS:,}": (
                self.workers is not None and not 1 <= self.workers <= MAX_WORKERS
            ),
            f"--limit-documents {limit} is below 1": limit is not None and limit < 1,
            f"--engine {self.engine!r} is unknown": self.engine not in ("local", "ray"),
            "--workers counts local threads: omit it with --engine ray": ray and self.workers,
            "--ray-address needs --engine ray": address is not None and not ray,
        }
        for message in (message for message, applies in problems.items() if applies):
            raise UserError(message, hint="see llmtrain prepare --help")

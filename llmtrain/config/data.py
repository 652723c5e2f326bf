"""The configuration of what is trained on: which tokens, in what lengths and shares.

Why apart from `config.py`: what a run reads is asked for without the rest, as a mixture is opened.

    DataConfig(path="data/openwebtext", mix=[MixConfig(path="data/old", weight=0.05)])
"""

from typing import Annotated

from pydantic import Field, model_validator

from llmtrain.config.base import Positive, Section


class BlockWarmupConfig(Section):
    """Sequence-length warm-up: the first steps train on shorter sequences (Li et al. 2021, arXiv 2108.06084).

    Each window of the batch is cut to its first tokens, so which windows a step reads does not change.
    """

    start: Positive = 64
    """Tokens of context in the first step."""
    steps: Positive
    """The context grows in a straight line and is data.block_size at this step."""
    multiple_of: Positive = 8
    """Lengths are rounded down to a multiple of this: fewer shapes to compile, and faster ones."""


class MixConfig(Section):
    """Other data in a fixed share of every batch, such as what a model was trained on before."""

    path: str
    """As data.path; tokens of the same tokenizer."""
    weight: Annotated[float, Field(gt=0, lt=1)]
    """Its share of the sequences; data.path has the rest."""


class DataConfig(Section):
    """What is trained on."""

    path: str
    """Folder that `llmtrain prepare` wrote (or nanoGPT's folder with train.bin and val.bin)."""
    block_size: Positive = 1024
    """Tokens of context in a training sample."""
    block_warmup: BlockWarmupConfig | None = None
    """Shorter samples at first; default: none."""
    mix: list[MixConfig] = Field(default=[])
    """Further folders to train on; validation is that of data.path."""

    @model_validator(mode="after")
    def _mix_leaves_a_share(self) -> "DataConfig":
        if (taken := sum(each.weight for each in self.mix)) >= 1:
            raise ValueError(
                f"the weights of mix are {taken:g} together and leave nothing for {self.path}"
            )
        return self

    @model_validator(mode="after")
    def _warmup_is_shorter(self) -> "DataConfig":
        if self.block_warmup is not None and self.block_warmup.start > self.block_size:
            raise ValueError(
                f"block_warmup.start {self.block_warmup.start} is above block_size {self.block_size}"
            )
        return self

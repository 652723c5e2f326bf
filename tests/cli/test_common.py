"""The helpers that all commands share."""

from dataclasses import dataclass
from typing import Annotated

from typing_extensions import Doc

from llmtrain.cli.common import help_of


@dataclass(frozen=True)
class Options:
    window: Annotated[int | None, Doc("Checkpoints in a window.")] = None


def test_help_of_an_option_is_the_doc_of_its_field() -> None:
    assert help_of(Options, "window") == "Checkpoints in a window."

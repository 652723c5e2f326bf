"""`llmtrain export`: weights as a repository that others run as it is.

llmtrain export runs/demo --to exported/demo --dtype bf16
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from .common import WeightsArgument, console, err_console, print_json


class Dtype(StrEnum):
    """Of the exported weights."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Form(StrEnum):
    """Whose format."""

    HF = "hf"
    NANOGPT = "nanogpt"


def export(
    to: Annotated[Path, typer.Option(metavar="DIR", help="New folder to write.")],
    target: WeightsArgument = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the exported weights.")] = Dtype.FP32,
    form: Annotated[
        Form,
        typer.Option(
            "--format",
            help="hf: a Hugging Face repository with tokenizer and model card. nanogpt: its ckpt.pt.",
        ),
    ] = Form.HF,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Then send the folder to this repository on the hub; a new one is made private.",
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2 or byte.", show_default="as config.json tells")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document and nothing else.")
    ] = False,
) -> None:
    """Write weights as a repository that runs elsewhere, without llmtrain.

    The model card tells data, recipe, losses and averaging as the run recorded them, and names no local folder.
    """
    from llmtrain.evaluation.selection import choose_weights
    from llmtrain.export import publish as library

    weights, _ = choose_weights(target)
    err_console.print(f"{weights.label}: {weights.path}", markup=False, style="dim", soft_wrap=True)
    library.export(
        weights, to, dtype=dtype.value, form=form.value, name=push or str(to), tokenizer=tokenizer
    )
    if form is Form.NANOGPT:
        err_console.print(
            "nanoGPT computes GELU exactly, GPT-2 by its tanh form: logits differ by some thousandths"
        )
    url = None
    if push is not None:
        from llmtrain.errors import RunFailed, UserError
        from llmtrain.storage.hub import push as send

        try:
            url = send(to, push)
        except (UserError, RunFailed) as error:
            error.hint += f"; {to} is complete, and `hf upload {push} {to}` sends it"
            raise
    if as_json:
        print_json(
            {
                "label": weights.label,
                "step": weights.step,
                "source": str(weights.path),
                "path": str(to),
                "url": url,
            }
        )
    else:
        console.print(f"{to}: written" + (f", sent to {url}" if url else ""), markup=False)

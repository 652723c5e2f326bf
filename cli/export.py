"""`llmtrain export`: write weights in a format that does not need llmtrain."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import (
    JsonFlag,
    WeightsArgument,
    console,
    err_console,
    local_folder,
    print_json,
    print_selection,
    warn,
)


def export(
    to: Annotated[
        Path, typer.Option(metavar="DIR", help="New folder to write.", callback=local_folder)
    ],
    target: WeightsArgument = None,
    dtype: Annotated[
        Literal["fp32", "bf16", "fp16"], typer.Option(help="Number format of the weights.")
    ] = "fp32",
    form: Annotated[
        Literal["hf", "nanogpt"],
        typer.Option(
            "--format",
            help="hf: Hugging Face repository with tokenizer and model card; nanogpt: ckpt.pt.",
        ),
    ] = "hf",
    push: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            help="Also upload the folder to this repository on the hub; a new one is private.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="gpt2 or byte.", show_default="from config.json")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write weights as a Hugging Face repository or a nanoGPT checkpoint.

    The model card contains data, recipe, losses and averaging from the run, but no local paths.
    """
    from llmtrain.evaluation.selection import choose_weights
    from llmtrain.export.publish import export as export_weights

    chosen = choose_weights(target)
    weights = chosen.weights
    print_selection(weights.label, weights.path, chosen.reason)
    name = push or str(to)
    export_weights(weights, to, dtype=dtype, form=form, name=name, tokenizer=tokenizer, warn=warn)
    url = None
    if push is not None:
        from llmtrain.storage.hub import push as upload

        err_console.print(f"{to} is complete; uploading it to {push}")
        url = upload(to, push)
    if as_json:
        document = {"label": weights.label, "step": weights.step, "source": str(weights.path)}
        print_json(document | {"path": str(to), "url": url})
    else:
        console.print(f"wrote {to}" + (f", uploaded to {url}" if url else ""))

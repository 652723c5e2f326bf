"""The model card of an exported model: what it is, from which data, by which recipe, how good, averaged how.

Why: whoever finds the folder on a hub has neither the run nor the data. Everything said here is read from
what the run recorded; what it did not record is left out. Names of local folders are not told.

    text = model_card(target, shape, tokenizer, dtype="bfloat16", name="gpt2-small-lawa")
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from llmtrain import __version__
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, load_origin
from llmtrain.checkpoints.gpt2_folder import Shape
from llmtrain.checkpoints.resolve import Target
from llmtrain.config.loading import dump_config, load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.manifest import MANIFEST_FILE, Manifest, read_manifest
from llmtrain.evaluation.results import Row, stored_rows
from llmtrain.model.tokenizer import Tokenizer
from llmtrain.planning.sizes import Architecture
from llmtrain.storage.json_files import read_json
from llmtrain.storage.run_folder import RAW

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def model_card(target: Target, shape: Shape, tokenizer: Tokenizer, *, dtype: str, name: str) -> str:
    """The text of `README.md`, Markdown behind a YAML header.

    Args:
        target: the weights that are exported, and their run if they have one.
        shape: of the model.
        tokenizer: whose ids it reads.
        dtype: of the exported weights.
        name: what the model is called: OWNER/NAME where it goes to the hub, else the folder.

    Raises:
        UserError: a file of the run is damaged.
    """
    config = load_config(target.run.config) if target.run else None
    manifests = _manifests(config) if config else []
    sections = [
        f"# {name.rpartition('/')[2]}",
        _summary(target, shape, dtype),
        _use(name if _HUB_NAME.fullmatch(name) else name.rpartition("/")[2]),
        _model(shape, tokenizer, dtype),
        *([_data(manifests)] if manifests else []),
        *([_losses(rows)] if (rows := _rows(target)) else []),
        *([_averaging(target.path)] if (target.path / PROVENANCE_FILE).exists() else []),
        *([_recipe(config)] if config else []),
    ]
    return "\n\n".join([_header(target, manifests), *sections]) + "\n"


def _header(target: Target, manifests: Sequence[Manifest]) -> str:
    averaged = (target.path / PROVENANCE_FILE).exists()
    fields: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "llmtrain", *(["weight-averaging"] if averaged else [])],
    }
    sources = [each.source for each in manifests]  # a folder here has no revision
    if datasets := [each.id for each in sources if each.revision and _HUB_NAME.fullmatch(each.id)]:
        fields["datasets"] = datasets
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _summary(target: Target, shape: Shape, dtype: str) -> str:
    parameters = Architecture(shape.model, shape.block_size).parameters
    origin = load_origin(target.path)
    of = f" of the run `{target.run.path.resolve().name}`" if target.run else ""
    at = f" at step {origin.step:,} ({origin.tokens:,} tokens)" if origin else ""
    return (
        f"A GPT-2 with {parameters:,} parameters. Its weights are `{target.label}`{of}{at}, in {dtype}, "
        f"exported by llmtrain {__version__}."
    )


def _use(name: str) -> str:
    return (
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        f'print(pipeline("text-generation", {json.dumps(name)})("Once")[0]["generated_text"])\n```'
    )


def _model(shape: Shape, tokenizer: Tokenizer, dtype: str) -> str:
    model = shape.model
    rows = [
        ("layers, heads, width", f"{model.n_layer}, {model.n_head}, {model.n_embd}"),
        ("context", f"{shape.block_size:,} tokens"),
        ("rows of the embedding", f"{model.vocab_size:,}"),
        ("tokenizer", f"{tokenizer.name}, {tokenizer.vocab_size:,} ids"),
        ("biases", "yes" if model.bias else "none (in the files: zeros)"),
        (
            "attention logits of layer i (from 1) divided by i",
            "yes" if model.scale_attn_by_inverse_layer_idx else "no",
        ),
        ("weights", dtype),
    ]
    return "## Model\n\n" + _table(("", ""), rows)


def _told(name: str) -> str:
    """OWNER/NAME on the hub as it is; of a folder here, its own name only."""
    is_public = _HUB_NAME.fullmatch(name) and not Path(name).exists()
    return name if is_public else name.rstrip("/").rpartition("/")[2]


def _manifests(config: RunConfig) -> list[Manifest]:
    """Of the data, and of what was mixed in, where it is still here."""
    folders = [Path(path) for path in (config.data.path, *(each.path for each in config.data.mix))]
    return [read_manifest(folder) for folder in folders if (folder / MANIFEST_FILE).is_file()]


def _data(manifests: Sequence[Manifest]) -> str:
    rows = [
        (
            f"`{_told(each.source.id)}`"
            + (f" at `{each.source.revision}`" if each.source.revision else ""),
            split,
            f"{record.documents:,}",
            f"{record.tokens:,}",
            f"{record.text_bytes:,}",
        )
        for each in manifests
        for split, record in (("train", each.train), ("val", each.val))
    ]
    table = _table(("source", "split", "documents", "tokens", "bytes of text"), rows)
    hashes = ", ".join(each.sha256 for each in manifests)
    return f"## Data\n\n{table}\n\nSHA-256 of what `llmtrain prepare` recorded: {hashes}."


def _rows(target: Target) -> list[Row]:
    """What was measured of these weights and of the others of their step."""
    if target.run is None:
        return []
    return [row for row in stored_rows(target.run) if row.step == target.step]


def _losses(rows: Sequence[Row]) -> str:
    lines = [
        (
            row.label,
            f"{row.loss:.4f}",
            "" if row.delta is None or row.label == RAW else f"{row.delta:+.4f}",
            "" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}",
            f"{row.tokens:,} of {row.split}",
            row.precision,
        )
        for row in rows
    ]
    table = _table(("weights", "loss", "minus raw", "bits per byte", "tokens", "precision"), lines)
    return (
        f"## Losses\n\nNats per token of the float32 weights, in disjoint windows of {rows[0].block_size:,} "
        f"tokens, each token but the first predicted once.\n\n{table}"
    )


def _averaging(folder: Path) -> str:
    document = read_json(folder / PROVENANCE_FILE)
    inputs = document.pop("inputs", [])
    lines = [
        (f"`{key}`", f"`{json.dumps(value)}`")
        for key, value in document.items()
        if value is not None
    ]
    text = f"## Averaging\n\n{_table(('', ''), lines)}"
    names = ("step", "weight", "lr", "tokens", "sha256")
    if isinstance(inputs, list) and all(isinstance(each, dict) for each in inputs) and inputs:
        rows = [[str(each.get(name, "")) for name in names] for each in inputs]
        text += f"\n\nThe checkpoints that were averaged:\n\n{_table(names, rows)}"
    return text


def _recipe(config: RunConfig) -> str:
    mix = [each.model_copy(update={"path": _told(each.path)}) for each in config.data.mix]
    data = config.data.model_copy(update={"path": _told(config.data.path), "mix": mix})
    begun = None if config.init_from is None else _told(config.init_from)
    text = dump_config(config.model_copy(update={"data": data, "init_from": begun}))
    return (
        f"## Recipe\n\nThe configuration of the run, for `llmtrain pretrain`:\n\n```yaml\n{text}```"
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )

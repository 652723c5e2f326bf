"""Model card of an exported model: usage, architecture, data, losses, averaging and recipe.

Everything comes from the records of the run; a section without its records is omitted. Local paths
are reduced to their last part, because the card may be published.
"""

import json
import re
from pathlib import Path

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from llmtrain import __version__
from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE, load_origin
from llmtrain.checkpoints.gpt2_folder import Shape
from llmtrain.checkpoints.resolve import Target
from llmtrain.config.loading import dump_config, load_config
from llmtrain.config.schema import RunConfig
from llmtrain.data.manifest import MANIFEST_FILE, Manifest, read_manifest
from llmtrain.errors import mask_credentials, printable
from llmtrain.evaluation.results import stored_results
from llmtrain.model.tokenizer import Tokenizer
from llmtrain.planning.sizes import Architecture
from llmtrain.storage.json_files import read_json

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


def model_card(target: Target, shape: Shape, tokenizer: Tokenizer, *, dtype: str, name: str) -> str:
    """Return the text of `README.md`: Markdown with a YAML header.

    `name` is OWNER/NAME for the hub, otherwise the folder.
    """
    run = target.run
    config = load_config(run.config) if run else None
    manifests = _read_manifests(config) if config else []
    provenance = target.path / PROVENANCE_FILE
    average = read_json(provenance) if provenance.exists() else {}
    inputs = average.pop("inputs", None)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        finalize=_plain,
    )
    environment.filters |= {"code": _code, "json": json.dumps, "public": _public_name}
    loadable = name if _HUB_NAME.fullmatch(name) else name.rpartition("/")[2]
    return environment.get_template("model_card.md.jinja").render(
        header=Markup(_header(manifests, averaged=provenance.exists())),
        title=name.rpartition("/")[2],
        loadable_name=Markup(json.dumps(loadable)),
        version=__version__,
        label=target.label,
        run=run and run.path.resolve().name,
        origin=load_origin(target.path),
        dtype=dtype,
        parameters=Architecture(shape.model, shape.block_size).parameters,
        shape=shape,
        tokenizer=tokenizer,
        manifests=manifests,
        losses=[row for row in stored_results(run) if row.step == target.step] if run else [],
        average={key: value for key, value in average.items() if value is not None},
        inputs=inputs if isinstance(inputs, list) else [],
        recipe=config and _fenced(dump_config(_without_local_paths(config)), "yaml"),
    )


def _header(manifests: list[Manifest], *, averaged: bool) -> str:
    fields: dict[str, object] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gpt2", "llmtrain", *(["weight-averaging"] if averaged else [])],
    }
    sources = [manifest.source for manifest in manifests]  # a local folder has no revision
    if datasets := [each.id for each in sources if each.revision and _HUB_NAME.fullmatch(each.id)]:
        fields["datasets"] = datasets
    return yaml.safe_dump(fields, sort_keys=False)


def _plain(value: object) -> str:
    """Escape Markdown in a value of the template, unless it is `Markup`."""
    if isinstance(value, Markup):
        return value
    return re.sub(r"[][\\`*_<>|&~$#]", r"\\\g<0>", printable(str(value)))


def _code(value: object) -> Markup:
    """Return a code span, in HTML if backticks cannot contain the text in a table."""
    text = printable(str(value))
    if text and not re.search(r"[`|\\<>&]|^ | $", text):
        return Markup(f"`{text}`")
    escaped = re.sub(r"[^\w .,:/=+-]", lambda match: f"&#{ord(match[0])};", text)
    return Markup(f"<code>{escaped.replace('_', '&#95;')}</code>")


def _fenced(text: str, language: str) -> Markup:
    """Return a code block whose fence is longer than any in the text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Markup(f"{fence}{language}\n{text}{fence}\n")


def _public_name(name: str) -> str:
    """Return OWNER/NAME on the hub unchanged, and only the last part of a local path."""
    is_public = _HUB_NAME.fullmatch(name) and not Path(name).exists()
    return name if is_public else mask_credentials(name).rstrip("/").rpartition("/")[2]


def _read_manifests(config: RunConfig) -> list[Manifest]:
    """Read the manifests of the training data that still exists."""
    folders = [Path(path) for path in (config.data.path, *(each.path for each in config.data.mix))]
    return [read_manifest(folder) for folder in folders if (folder / MANIFEST_FILE).is_file()]


def _without_local_paths(config: RunConfig) -> RunConfig:
    mix = [each.model_copy(update={"path": _public_name(each.path)}) for each in config.data.mix]
    data = config.data.model_copy(update={"path": _public_name(config.data.path), "mix": mix})
    initial = None if config.init_from is None else _public_name(config.init_from)
    return config.model_copy(update={"data": data, "init_from": initial})

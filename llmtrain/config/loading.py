"""Load a configuration: defaults, then the YAML file, then each `--set a.b=c`.

All errors are reported at once, each with file, line, key and the nearest valid key.
"""

import re
from collections.abc import Generator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmtrain.config.recipes import did_you_mean
from llmtrain.config.schema import RunConfig
from llmtrain.config.sections import Section
from llmtrain.errors import UserError

_MAX_VALUES = 100_000
"""Limit of values in a file after alias expansion, against "billion laughs" attacks."""

_INTEGER = re.compile(r"[-+]?\d[\d_]*$")
_FLOAT = re.compile(
    r"[-+]?(\.\d[\d_]*|\d[\d_]*(\.[\d_]*)?)([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
)
_SET = "--set"

_MESSAGES = {"model_type": "must be a section with keys", "tuple_type": "must be a list of numbers"}
"""Messages for pydantic's error types that name Python types."""


class _Mapping(dict[Any, Any]):
    """Mapping with the origin of each key, `FILE, line N` or `--set`."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, str] = {}


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 that reads `6e-4` as a number and rejects duplicate keys."""

    source = ""

    def construct_yaml_map(self, node: yaml.MappingNode) -> Generator[_Mapping, None, None]:
        mapping = _Mapping()
        yield mapping  # aliases inside the node may refer to it
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in mapping.places:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            mapping.places[key] = f"{self.source}, line {key_node.start_mark.line + 1}"
        mapping.update(self.construct_mapping(node))


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_yaml_map)
# YAML 1.1 reads 1:30 as the number 90 (base 60); keep it a string.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, _INTEGER if tag.endswith(":int") else regexp)
        for tag, regexp in resolvers
        if ":float" not in tag
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_config(file: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML configuration, apply `section.key=value` overrides and check it."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        hint = "copy an included configuration: llmtrain recipes NAME --to FILE"
        raise UserError(f"cannot read the config {file}: {reason}", hint=hint) from None
    values = _parse_yaml(text, str(file))
    if not isinstance(values, _Mapping):
        raise UserError(f"{file} contains no keys", hint="print an example: llmtrain recipes demo")
    for override in overrides or []:
        _override(values, override)
    values.setdefault("name", file.stem)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as invalid:
        raise UserError(
            "\n  ".join(_describe(error, values, str(file)) for error in invalid.errors()),
            hint="every key is explained in the demo configuration: llmtrain recipes demo",
        ) from None


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def _parse_yaml(text: str, source: str) -> Any:
    try:
        loader = _Loader(text)
        loader.source = source
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MAX_VALUES:
            raise ValueError("its aliases expand to too many values")
        return loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "check indentation, quotes and brackets around that line"
        raise UserError(f"{place}: not valid YAML: {problem}", hint=hint) from None


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values in a node after the expansion of all aliases."""
    if id(node) not in counts:
        counts[id(node)] = _MAX_VALUES  # the count of an alias to an enclosing node
        children = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in children for child in pair]
        counts[id(node)] = 1 + sum(_count_values(child, counts) for child in children)
    return counts[id(node)]


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip("."):
        hint = "write it like --set optimizer.lr=6e-3"
        raise UserError(f"--set {override!r}: not of the form SECTION.KEY=VALUE", hint=hint)
    value = _parse_yaml(text, f"--set {path}")
    *parents, last = path.strip().split(".")
    place: Any = values
    try:
        for part in parents:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = _Mapping()
            place = place[_key(place, part)]
        place[_key(place, last)] = value
        if isinstance(place, _Mapping):
            place.places[last] = _SET
    except (IndexError, TypeError, ValueError):
        message = f"--set {path}: the config has no such section or list item"
        raise UserError(message, hint="print all keys: llmtrain config FILE") from None


def _key(place: Any, part: str) -> str | int:
    return int(part) if isinstance(place, list) and part.isdecimal() else part


def _describe(error: ErrorDetails, values: _Mapping, file: str) -> str:
    """Return a pydantic error as `file, line n: key: problem`, with the deepest known line."""
    place, value, keys = file, values, []
    for part in error["loc"]:  # some parts are the kind of a section
        if isinstance(value, _Mapping) and part in value:
            place = value.places.get(str(part), place) if place != _SET else _SET
        elif not (isinstance(value, list) and isinstance(part, int) and part < len(value)):
            continue
        keys.append(str(part))
        value = value[part]
    if keys and isinstance(value, _Mapping) and _SET in value.places.values():
        place = _SET
    if error["type"] == "missing":
        keys.append(str(error["loc"][-1]))
    return ": ".join(part for part in (place, ".".join(keys), _message(error)) if part)


def _message(error: ErrorDetails) -> str:
    match error["type"]:
        case "extra_forbidden":
            return "unknown key" + _suggest_key(error["loc"])
        case "missing":
            return "required key is missing"
        case "union_tag_not_found":
            return f"required key {error['ctx']['discriminator']} is missing"
        case "union_tag_invalid":
            discriminator, expected = error["ctx"]["discriminator"], error["ctx"]["expected_tags"]
            tag, known = str(error["ctx"]["tag"]), expected.replace("'", "").split(", ")
            key = discriminator.replace("'", "")
            return f"{key} {tag!r} is not one of {', '.join(known)}{did_you_mean(tag, known)}"
        case "value_error":
            return error["msg"].removeprefix("Value error, ")
        case kind:
            return f"{_MESSAGES.get(kind, error['msg'])} (got {error['input']!r:.60})"


def _suggest_key(location: tuple[int | str, ...]) -> str:
    """Return the rest of the message for an unknown key: the nearest valid key, or all of them."""
    *parents, key = map(str, location)
    sections: list[type[Section]] = [RunConfig]
    kinds: list[type[Section]] = []
    for part in parents:
        field = next((s.model_fields[part] for s in sections if part in s.model_fields), None)
        if field is not None:
            sections, kinds = _sections_in(field.annotation), []
        elif not part.isdecimal():  # pydantic adds the kind after a section with several kinds
            sections, kinds = [s for s in sections if part in _kinds(s)], sections
    if owners := [kind for s in kinds if key in s.model_fields for kind in _kinds(s)]:
        return f" for {parents[-1]}, valid only for {', '.join(owners)}"
    known = list(sections[0].model_fields)
    return did_you_mean(key, known) or f"; valid keys are {', '.join(known)}"


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _kinds(section: type[Section]) -> tuple[str, ...]:
    field = section.model_fields.get("kind") or section.model_fields["name"]
    return get_args(field.annotation)

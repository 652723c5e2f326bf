"""Load a configuration: defaults, then the YAML file, then each `--set a.b=c`.

All errors are reported at once, each with file, line, key and the nearest valid key.

    config = load_config(Path("configs/demo.yaml"), overrides=["optimizer.lr=6e-3"])
"""

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llmtrain.config.recipes import did_you_mean, list_recipes
from llmtrain.config.schema import RunConfig
from llmtrain.config.sections import Section
from llmtrain.errors import UserError

_MAX_VALUES = 100_000
"""Limit of values in a file after alias expansion, against "billion laughs" attacks."""

_INTEGER = re.compile(r"[-+]?\d[\d_]*$")
_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$"
    r"|\.(nan|NaN|NAN)$"
)

_MESSAGES = {
    "model_type": "must be a section with keys",
    "tuple_type": "must be a list of numbers",
    "list_type": "must be a list",
    "string_pattern_mismatch": "must start with a letter or digit and contain only letters, "
    "digits, '.', '_' and '-'",
}
"""Messages for pydantic's error types that name Python types."""


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 that reads `6e-4` as a number and rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


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
    """Read a YAML configuration and apply `section.key=value` overrides.

    Raises:
        UserError: the file is unreadable, or a key, a type or a combination is invalid.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"cannot read the config {file}: {reason}", hint=_hint_for_unreadable(file, error)
        ) from None
    values, node = _parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise UserError(f"{file} contains no keys", hint="print an example: llmtrain recipes demo")
    for override in overrides or []:
        _override(values, override)
    values.setdefault("name", file.stem)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as invalid:
        raise UserError(
            "\n".join(
                _describe(error, values, file, node, overrides or []) for error in invalid.errors()
            ),
            hint="every key is explained in the demo configuration: llmtrain recipes demo",
        ) from None


def dump_config(config: RunConfig) -> str:
    """Return the resolved configuration as YAML that `load_config` reads back unchanged."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def _hint_for_unreadable(file: Path, error: Exception) -> str:
    known = {recipe.name for recipe in list_recipes()}
    if not isinstance(error, FileNotFoundError) or file.stem not in known:
        return "list and copy the included configurations: llmtrain recipes"
    to = shlex.quote(str(file.with_suffix(".yaml")))
    return f"copy the included one: llmtrain recipes {file.stem} --to {to}"


def _parse_yaml(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """Return the value of a YAML text and its node tree, which has the line numbers."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _count_values(node, {}) > _MAX_VALUES:
            raise ValueError("its aliases expand to too many values")
        return (loader.construct_document(node) if node is not None else None), node
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"{place}: not valid YAML: {problem}",
            hint="check indentation, quotes and brackets around that line",
        ) from None


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
        raise UserError(
            f"--set {override!r}: not of the form SECTION.KEY=VALUE",
            hint="write it like --set optimizer.lr=6e-3",
        )
    value, _ = _parse_yaml(text, f"--set {path}")
    *parents, last = path.strip().split(".")
    place: Any = values
    try:
        for part in parents:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[_key(place, part)]
        place[_key(place, last)] = value
    except (IndexError, TypeError, ValueError):
        raise UserError(
            f"--set {path}: the config has no such section or list item",
            hint="print all keys: llmtrain config FILE",
        ) from None


def _key(place: Any, part: str) -> str | int:
    return int(part) if isinstance(place, list) and part.isdecimal() else part


def _describe(
    error: ErrorDetails,
    values: dict[str, Any],
    file: Path,
    node: yaml.Node | None,
    overrides: list[str],
) -> str:
    """Return a pydantic error as `file, line n: key: problem`."""
    location = _location(error, values)
    key = ".".join(location)
    place = str(file)
    if any(_overlap(override.partition("=")[0].strip(), key) for override in overrides):
        place = "--set"
    elif line := _line_of(node, location):
        place = f"{file}, line {line}"
    return ": ".join(part for part in (place, key, _message(error)) if part)


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
            return f"{_MESSAGES.get(kind, error['msg'])} (got {error['input']!r})"


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
            sections, kinds = [s for s in sections if _kind(s) == part], sections
    if owners := [_kind(section) for section in kinds if key in section.model_fields]:
        return f" for {parents[-1]}, valid only for {', '.join(owners)}"
    known = list(sections[0].model_fields)
    return did_you_mean(key, known) or f"; valid keys are {', '.join(known)}"


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]


def _kind(section: type[Section]) -> str:
    field = section.model_fields.get("kind") or section.model_fields["name"]
    return str(get_args(field.annotation)[0])


def _location(error: ErrorDetails, values: dict[str, Any]) -> list[str]:
    """Return the path of the error in the file: pydantic's path without the kinds in it."""
    location: list[str] = []
    place: Any = values
    for part in error["loc"]:
        inside_list = isinstance(place, list) and isinstance(part, int) and part < len(place)
        if inside_list or (isinstance(place, dict) and part in place):
            location.append(str(part))
            place = place[part]
    if error["type"] == "missing":
        location.append(str(error["loc"][-1]))
    return location


def _overlap(one: str, other: str) -> bool:
    """Return True if two dotted keys are equal or one contains the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


def _line_of(node: yaml.Node | None, location: list[str]) -> int | None:
    """Return the line (from 1) of the deepest part of `location` that the file contains."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == part), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif (
            isinstance(node, yaml.SequenceNode) and part.isdecimal() and int(part) < len(node.value)
        ):
            node = node.value[int(part)]
            line = node.start_mark.line + 1
    return line

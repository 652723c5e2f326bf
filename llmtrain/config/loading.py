"""A configuration read from its file: defaults, then the YAML, then each `--set a.b=c`, in that order.

Why apart from `config.py`: what is right is one idea, and what a person is told when it is wrong
another. A mistake names the file, the line, the key and the nearest right name; all are told at once.

    config = load_config(Path("configs/demo.yaml"), overrides=["optimizer.lr=6e-3"])
"""

import difflib
import re
import shlex
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from llmtrain.config.averages import AverageConfig
from llmtrain.config.base import Section
from llmtrain.config.recipes import recipes
from llmtrain.config.schema import RunConfig, ScheduleConfig
from llmtrain.errors import UserError

_UNIONS: dict[str, Any] = {"schedule": ScheduleConfig, "averages": AverageConfig}
"""Keys whose section is one of several, told apart by a name in it."""
_TAGS = {"schedule": "name", "averages": "kind"}

_PLAIN = {
    "model_type": "should be a section of keys",
    "tuple_type": "should be a list of numbers",
    "list_type": "should be a list",
    "string_pattern_mismatch": "should be letters, digits, '.', '_' and '-', beginning with a letter or digit",
}
"""What pydantic says with words of Python, said plainly."""


_INTEGER = re.compile(r"[-+]?\d[\d_]*$")
_FLOAT = re.compile(
    r"[-+]?(\d[\d_]*\.[\d_]*([eE][-+]?\d+)?|\.\d[\d_]*([eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.(inf|Inf|INF))$"
    r"|\.(nan|NaN|NAN)$"
)


_MOST_NODES = 100_000
"""Values in a configuration, far beyond any that a person writes."""


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 in which `6e-4` is a number and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


# YAML 1.1 reads 1:30 as ninety, in base 60; to a person it is no number.
_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, _INTEGER if tag.endswith(":int") else regexp)
        for tag, regexp in resolvers
        if ":float" not in tag
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def parse_yaml(text: str, source: str) -> tuple[Any, yaml.Node | None]:
    """The value of a YAML text and its node tree (for line numbers).

    Raises:
        UserError: not YAML, an object tag, a repeated key; with the line.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is not None and _expanded(node, {}) > _MOST_NODES:
            raise ValueError("its aliases stand for too many values")
        return (loader.construct_document(node) if node is not None else None), node
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}, line {mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(
            f"{place}: not valid YAML: {problem}",
            hint="check indentation, quotes and brackets around that line",
        ) from None


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for once every alias in it is written out: nested ones multiply."""
    if id(node) not in known:
        known[id(node)] = _MOST_NODES  # for an alias to what it is in
        if isinstance(node, yaml.MappingNode):
            inner = [each for pair in node.value for each in pair]
        else:
            inner = node.value if isinstance(node, yaml.SequenceNode) else []
        known[id(node)] = 1 + sum(_expanded(each, known) for each in inner)
    return known[id(node)]


def _where_from(file: Path, error: Exception) -> str:
    """What to do about a file that cannot be read: it may be a recipe's name in a folder without them."""
    if not isinstance(error, FileNotFoundError) or file.stem not in {
        each.name for each in recipes()
    }:
        return "llmtrain recipes lists the shipped ones and copies them"
    to = shlex.quote(str(file.with_suffix(".yaml")))
    return f"copy the shipped one: llmtrain recipes {file.stem} --to {to}"


def load_config(file: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML configuration and apply `section.key=value` overrides.

    Raises:
        UserError: the file cannot be read, or a key, a type or a combination is wrong.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(
            f"cannot read the config {file}: {reason}", hint=_where_from(file, error)
        ) from None
    values, node = parse_yaml(text, str(file))
    if not isinstance(values, dict):
        raise UserError(
            f"{file} holds no keys", hint="llmtrain recipes demo prints one that explains itself"
        )
    for override in overrides or []:
        _apply(values, override)
    values.setdefault("name", file.stem)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(
            "\n".join(
                _describe(dict(e), values, file, node, overrides or []) for e in error.errors()
            ),
            hint="llmtrain recipes demo prints a configuration that explains every key",
        ) from None


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=100)


def _apply(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip("."):
        raise UserError(
            f"--set {override!r} is not section.key=value",
            hint="for example --set optimizer.lr=6e-3",
        )
    value, _ = parse_yaml(text, f"--set {path}")
    *parents, last = path.strip().split(".")
    place: Any = values
    for part in parents:
        if isinstance(place, dict) and place.get(part) is None:
            place[part] = {}
        if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
            place = place[int(part)]
        elif isinstance(place, dict):
            place = place[part]
        else:
            place = None
    if isinstance(place, list) and last.isdecimal() and int(last) < len(place):
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise UserError(
            f"--set {path}: there is no such place in the config",
            hint="see `llmtrain pretrain --help`",
        )


def _describe(
    error: dict[str, Any],
    values: dict[str, Any],
    file: Path,
    node: yaml.Node | None,
    overrides: list[str],
) -> str:
    """One pydantic error as `file, line n: key: what is wrong`."""
    location = _location(error, values)
    key = ".".join(location)
    if any(_touches(override.partition("=")[0].strip(), key) for override in overrides):
        place = "--set"
    else:
        line = _line_of(node, location)
        place = f"{file}, line {line}" if line else str(file)
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "there is no such key" + _nearest(location, values)
    elif error["type"] == "missing":
        message = "this key is required"
    elif error["type"] == "union_tag_not_found":
        message = f"the key {error['ctx']['discriminator']} is required"
    elif error["type"] == "union_tag_invalid":
        known = error["ctx"]["expected_tags"].replace("'", "").split(", ")
        near = difflib.get_close_matches(str(error["ctx"]["tag"]), known, n=1)
        message = (
            f"{error['ctx']['discriminator'].strip(chr(39))} {error['ctx']['tag']!r} is not one of "
            f"{', '.join(known)}" + (f"; did you mean {near[0]}?" if near else "")
        )
    elif error["type"] in _PLAIN:
        message = f"{_PLAIN[error['type']]} (got {error['input']!r})"
    elif error["type"] != "value_error":
        message = f"{message} (got {error['input']!r})"
    return f"{place}: {key}: {message}" if key else f"{place}: {message}"


def _location(error: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """Where in the file the error is: pydantic's path without the names of union members in it."""
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


def _touches(override: str, key: str) -> bool:
    """Whether `--set override=…` wrote `key`, or a part of it, or the section it is in."""
    return override == key or override.startswith(f"{key}.") or key.startswith(f"{override}.")


def _fields(location: list[str], values: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """Keys of the section that holds the last part of `location`; of a union also those of each kind."""
    fields: dict[str, Any] = dict(RunConfig.model_fields)
    place: Any = values
    for part in location[:-1]:
        place = place[int(part)] if isinstance(place, list) else place[part]
        if part in _UNIONS:
            members = get_args(get_args(_UNIONS[part])[0])
            kinds = {
                get_args(m.model_fields[_TAGS[part]].annotation)[0]: list(m.model_fields)
                for m in members
            }
            if isinstance(place, list):
                place = place[int(location[1])]
            return kinds.get(place.get(_TAGS[part]), []), kinds
        annotation = fields[part].annotation if part in fields else None  # none: a place in a list
        for each in (
            annotation,
            *get_args(annotation),
        ):  # a section, one that may be null, or a list of them
            if isinstance(each, type) and issubclass(each, Section):
                fields = dict(each.model_fields)
    return list(fields), {}


def _nearest(location: list[str], values: dict[str, Any]) -> str:
    known, kinds = _fields(location, values)
    if owners := [kind for kind, keys in kinds.items() if location[-1] in keys]:
        return f" for this kind, only for {', '.join(owners)}"
    matches = difflib.get_close_matches(location[-1].lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]}?" if matches else f"; there are {', '.join(known)}"


def _line_of(node: yaml.Node | None, location: list[str]) -> int | None:
    """Line (from 1) of the deepest part of `location` that the file holds."""
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

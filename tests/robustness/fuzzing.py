"""Strategies of the fuzz tests: mutated trees, JSON lines, command lines."""

import enum
import json
import typing
from pathlib import Path
from typing import Any

import typer.main
import yaml
from hypothesis import strategies as st

from llmtrain.cli.main import app

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-3, 12)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["auto", "cosine", "wsd", "ema", "lawa", 10**400, -(2**63), "~", "1e3", "../x", "name"]
    )
)
"""JSON and YAML values; some are valid for some key."""


def places_in(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a tree."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [path, *(place for key, value in items for place in places_in(value, (*path, key)))]


DEMO = (Path(__file__).parents[2] / "configs" / "demo.yaml").read_text()
KEYS = sorted(
    {str(place[-1]) for place in places_in(yaml.safe_load(DEMO))[1:]}
    | {"horizon", "decay_steps", "window"}
)
TREES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def mutated(draw: st.DrawFn, tree: Any) -> Any:
    """Replace, remove or add up to three values of a JSON or YAML tree."""
    tree = json.loads(json.dumps(tree))
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(places_in(tree)[1:] or [("x",)]))
        place = tree
        for key in parents:
            place = place[key]
        if isinstance(place, dict):
            last = draw(st.sampled_from([last, last, last, draw(st.sampled_from(KEYS))]))
        match draw(st.sampled_from(["replace", "replace", "leave out", "double"])):
            case "replace":
                place[last] = draw(TREES)
            case "leave out" if isinstance(place, dict):
                place.pop(last, None)
            case "leave out":
                del place[last]
            case _ if isinstance(place, list):
                place.insert(0, place[last])
    return tree


def encoded(document: object) -> bytes:
    """Return a JSON line without its newline."""
    return json.dumps(document).encode()


TEXTS = st.text(max_size=30) | st.sampled_from(["\ud800", "\0", "a\u2028b", "x" * 3000])
ODD_LINES = [
    b"", b"  ", b"[1]", b"null", b'{"text": ', b'{"text": "\xff"}', b"[" * 5000, b"9" * 5000,
    b"\0", b"\r", b'{"text": "a", "text": "b"}', b'{"text": 1e999}', b'\xef\xbb\xbf{"text": "b"}',
    b'{"text": "\\ud83d"}',
]  # fmt: skip
ROWS = st.dictionaries(
    st.sampled_from(["text", "id"]), TEXTS | SCALARS | st.lists(SCALARS, max_size=2)
)
LINES = ROWS.map(encoded) | st.sampled_from(ODD_LINES) | st.binary(max_size=20)
"""Valid, invalid and truncated lines of a JSONL file."""

EVENT_KEYS = ["step", "val/loss", "val/loss/ema-0.9", "val/tokens", "seconds", "x"]
EVENTS = st.dictionaries(st.sampled_from(EVENT_KEYS), SCALARS | TREES).map(encoded)
"""Lines of metrics.jsonl."""

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group
HINTS = {
    info.name or info.callback.__name__: typing.get_type_hints(info.callback)
    for info in app.registered_commands
    if info.callback is not None
}
VALUES = [
    "", "-", "--", "0", "1", "2", "4", "8", "-1", "0.5", "nan", "inf", "1e999", "9" * 400, "last",
    "all", "2,4", "x=1", "window=2 every=2", "window=0 every=-1", "train.max_steps=10", "a.b.c=[",
    "=", "name=../x", "text", "gpt2", "byte", "lawa", "ema", "swa", "custom", "dense",
    "posthoc-ema", "cpu", "cuda:99", "val", "never", "1s", "5GB", "float16", "data", "runs/run",
    "runs/run/snapshots", "runs/run/snapshots/step-00000004", "runs/run/metrics.jsonl", "runs",
    "runs/run/state/step-00000004", "runs/run/averages/ema-0.9/step-00000008", "config.yaml",
    "text.txt", "data/manifest.json", "new", "new/deep", "..", "../new", ".", "/dev/null",
    "/dev/null/x", "/proc/x", "a" * 300, "\udcff", "ü/😀", "no\nwhere", "*", "[", "hub:", "hub:x",
    "hub:a/b:c", "a/b", "sotu", "a/b/c", "~x", "{N}",
]  # fmt: skip


NUMBERS = ["0", "1", "2", "4", "8", "-1", "0.5", "nan", "1e999", "9" * 400, "10"]
AVERAGE, TO_8 = ["average", "runs/run", "--window", "2"], ["--from", "4", "--at", "8"]
RIGHT = [
    [*AVERAGE, "--every", "2"],
    [*AVERAGE, "--every", "2", "--at", "all", "--out", "new"],
    ["average", "runs/run", "--every", "2", "--method", "ema", "--decay", "0.5"],
    ["average", "runs/run", "--method", "dense", *TO_8],
    ["average", "runs/run", "--sweep", "window=2 every=2"],
    ["eval", "runs/run", "--tokens", "64"],
    ["eval", "runs/run/snapshots/step-00000004", "--json"],
    ["inspect", "runs/run"],
    ["report"],
    ["verify", "data", "runs"],
    ["prepare", "text.txt", "--tokenizer", "byte", "--val-fraction", "0", "--out", "new"],
    ["pretrain", "--config", "config.yaml"],
    ["pretrain", "--config", "config.yaml", "--run-dir", "new"],
    ["pretrain", "--config", "config.yaml", "--set", "train.max_steps=10"],
    *([name] for name in COMMANDS),
]
"""Command lines to mutate; most of them are valid."""


def fitting(command: str, option: str) -> list[str]:
    """Return values of the type of an option."""
    hint = HINTS[command].get(option, str)
    kinds = [hint, *typing.get_args(hint)]
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            return [str(choice) for choice in typing.get_args(kind)]
        if isinstance(kind, type) and issubclass(kind, enum.Enum):
            return [each.value for each in kind]
    return NUMBERS if int in kinds or float in kinds else VALUES


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Add options, mostly with values of their type, and possibly replace a word."""
    words = list(draw(st.sampled_from(RIGHT)))
    # The output of another process is not captured.
    options = [option for option in COMMANDS[words[0]].params if option.name != "nproc"]
    for option in draw(st.lists(st.sampled_from(options), max_size=3)):
        if option.param_type_name == "argument":
            words.append(draw(st.sampled_from(VALUES)))
            continue
        words.append(draw(st.sampled_from([*option.opts, *option.secondary_opts])))
        if not option.is_flag:
            words.append(draw(st.sampled_from(fitting(words[0], option.name))))
    if draw(st.integers(0, 3)) == 0:
        words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(VALUES))
    return words

"""Names and texts of others: no command prints their control characters or forged lines."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from in_process import invoke
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from llmtrain.checkpoints.checkpoint import PROVENANCE_FILE
from llmtrain.config.loading import dump_config, load_config
from llmtrain.storage.integrity import write_integrity

pytestmark = pytest.mark.slow

FORGED = "FORGED"
EVIL = f"x\x1b[31m\r\n{FORGED} # [bold]`|*<b>${{$\u202e\u2028\x9b\x7f&amp;![a](b)"
"""A file name that combines all kinds of attack."""
LABEL = f"evil{EVIL}"


@pytest.fixture
def hostile(workplace: Path) -> Path:
    """The trained run under a hostile name, with hostile contents."""
    run = (workplace / "runs/run").rename(workplace / "runs" / EVIL)
    config = load_config(run / "config.yaml")
    data = (workplace / "data").rename(workplace / EVIL)
    changed = config.data.model_copy(update={"path": data.name})
    text = dump_config(config.model_copy(update={"data": changed}))
    for path in (run / "config.yaml", workplace / "config.yaml"):
        path.write_text(text)
    average = next((run / "averages").iterdir())
    shutil.copytree(average, run / "averages" / LABEL)
    for path in (run / "averages" / LABEL).rglob(PROVENANCE_FILE):
        document = json.loads(path.read_text()) | {
            "method": EVIL,
            EVIL: EVIL,
            "inputs": [
                {"step": 4, "weight": 1.0, "path": EVIL, "sha256": EVIL, "lr": EVIL, EVIL: 1}
            ],
        }
        path.write_text(json.dumps(document))
        write_integrity(path.parent)
    events = [
        {"step": 8, "val/loss": 5.0, f"val/loss/{EVIL}": 4.0, EVIL: EVIL},
        {"step": 8, "sample": EVIL},
        {"step": 8, "incident": EVIL, "action": EVIL},
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    (run / "environment.json").write_text(json.dumps({EVIL: EVIL}))
    for path in (run / "evals").glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"label": EVIL}))
    for step in (10, 20):
        folder = workplace / f"series{EVIL}" / f"step{step}"
        folder.mkdir(parents=True)
        save_file({EVIL: torch.full((3,), 1.0 * step)}, folder / "model.safetensors")
    return workplace


def control_characters(text: str) -> list[str]:
    return [
        char
        for char in text
        if char != "\n"
        and (unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") or char == "\u202e")
    ]


def assert_safe(text: str) -> None:
    assert not control_characters(text), text
    assert not any(line.lstrip("│ ").startswith(FORGED) for line in text.split("\n")), text


RUN = f"runs/{EVIL}"
COMMANDS = {
    "runs": ("runs",),
    "runs --json": ("runs", "--json"),
    "report": ("report", RUN),
    "report --json": ("report", RUN, "--json"),
    "eval": ("eval", RUN, "--tokens", "64"),
    "eval --all": ("eval", RUN, f"{RUN}/averages/{LABEL}/step-00000008", "--tokens", "32"),
    "eval --text": ("eval", RUN, "--text", f"text{EVIL}"),
    "average": ("average", RUN, "--every", "2", "--window", "2"),
    "average --show-weights": (
        *("average", RUN, "--every", "2", "--window", "2", "--show-weights"),
    ),
    "average --json": ("average", RUN, "--every", "2", "--window", "2", "--json"),
    "average series": ("average", f"series{EVIL}", "--every", "10", "--window", "2"),
    "average no window": ("average", RUN, "--every", "3"),
    "average sweep": ("average", RUN, "--sweep", "window=2 every=2"),
    "inspect": ("inspect", RUN, "--tensors"),
    "inspect average": ("inspect", f"{RUN}/averages/{LABEL}/step-00000008"),
    "inspect series": ("inspect", f"series{EVIL}", "--tensors"),
    "inspect --json": ("inspect", f"series{EVIL}", "--tensors", "--json"),
    "verify": ("verify", RUN, EVIL),
    "generate": ("generate", RUN, "--max-tokens", "4", "--tokenizer", "byte", "--prompt", "\u202e"),
    "generate --compare": (
        *("generate", f"{RUN}/averages/{LABEL}/step-00000008", "--compare"),
        *("--max-tokens", "3", "--tokenizer", "byte"),
    ),
    "export": ("export", RUN, "--to", f"out{EVIL}", "--tokenizer", "byte"),
    "export average": (
        *("export", f"{RUN}/averages/{LABEL}/step-00000008", "--to", "card", "--tokenizer", "byte"),
    ),
    "config": ("config", RUN),
    "config --diff": ("config", RUN, "--diff", "config.yaml", "--set", f"name={EVIL!r}"),
    "plan": ("plan", "-c", "config.yaml"),
    "doctor": ("doctor", "-c", "config.yaml", "--run-dir", RUN),
    "pretrain": ("pretrain", "-c", "config.yaml", "--run-dir", RUN),
    "pretrain new": (
        *("pretrain", "-c", "config.yaml", "--run-dir", f"new{EVIL}", "--set", "train.max_steps=2"),
    ),
    "unknown option": ("runs", f"--x{EVIL}"),
    "unknown command": (EVIL,),
    "missing file": ("eval", f"nowhere{EVIL}"),
    "bad set": ("config", "config.yaml", "--set", f"train.{EVIL}=1"),
    "bad value": ("config", "config.yaml", "--set", f"train.max_steps={EVIL!r}"),
    "prepare": ("prepare", f"text{EVIL}.txt", "--out", f"new{EVIL}", "--tokenizer", "byte"),
    "prepare nothing": ("prepare", f"none{EVIL}.jsonl"),
    "traceback": ("--debug", "inspect", f"nowhere{EVIL}"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_output_of_every_command(hostile: Path, name: str) -> None:
    shutil.copy(hostile / "text.txt", hostile / f"text{EVIL}")
    shutil.copy(hostile / "text.txt", hostile / f"text{EVIL}.txt")
    outcome = invoke(*COMMANDS[name], cwd=hostile)
    assert "this is a bug" not in outcome.stderr, outcome.stderr
    assert_safe(outcome.stdout)
    assert_safe(outcome.stderr)
    if "--json" in COMMANDS[name]:
        json.loads(outcome.stdout)


DAMAGE = {
    "config": ("config.yaml", f"{json.dumps(EVIL)}: 1\n"),
    "events": ("metrics.jsonl", json.dumps({"step": EVIL}) + "\n"),
    "record": (
        "snapshots/step-00000008/integrity.json",
        json.dumps({"files": {EVIL: {"bytes": 1, "sha256": "0" * 64}}}),
    ),
    "training": ("snapshots/step-00000008/training.json", json.dumps({"step": EVIL, EVIL: 1})),
    "model": ("snapshots/step-00000008/config.json", json.dumps({"model_type": EVIL})),
    "header": ("snapshots/step-00000008/model.safetensors", EVIL * 9),
    "index": (
        "snapshots/step-00000008/model.safetensors.index.json",
        json.dumps({"weight_map": {EVIL: EVIL}}),
    ),
    "manifest": (f"../../{EVIL}/manifest.json", json.dumps({EVIL: 1, "sha256": EVIL})),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_errors_that_quote_files(hostile: Path, kind: str) -> None:
    file, content = DAMAGE[kind]
    (hostile / "runs" / EVIL / file).write_text(content)
    for command in (
        *("runs", "report", "eval", "average", "inspect", "verify", "export", "config", "pretrain"),
    ):
        outcome = invoke(*COMMANDS[command], cwd=hostile)
        assert "this is a bug" not in outcome.stderr, outcome.stderr
        assert_safe(outcome.stdout)
        assert_safe(outcome.stderr)


def test_the_model_card_has_no_foreign_markup(hostile: Path) -> None:
    assert invoke(*COMMANDS["export average"], cwd=hostile).code == 0
    card = (hostile / "card/README.md").read_text()
    assert_safe(card)
    _, header, body = card.split("---\n", 2)
    assert FORGED not in header
    parsed = MarkdownIt("commonmark").enable("table").parse(body)
    headings = Counter(token.tag for token in parsed if token.type == "heading_open")
    assert headings["h1"] == 1
    assert set(headings) == {"h1", "h2"}
    kinds = {(child.type, child.content) for token in parsed for child in token.children or []}
    assert {content for kind, content in kinds if kind == "html_inline"} <= {"<code>", "</code>"}
    assert not {kind for kind, _ in kinds} & {"link_open", "image", "strong_open", "em_open"}
    rows = " ".join(token.type for token in parsed).split("tr_close")
    assert {row.count("td_open") for row in rows} == {0, 2, 5, 6}


def test_the_report_has_no_foreign_markup(hostile: Path) -> None:
    assert invoke("report", RUN, "--out", "page", cwd=hostile).code == 0
    page = (hostile / "page/report.html").read_text()
    for path in (hostile / "page").glob("*.[chs]*"):
        assert not control_characters(path.read_text())
    assert "FORGED # [bold]`|*<b>" not in page
    assert "&lt;b&gt;" in page
    with (hostile / "page/losses.csv").open(newline="") as file:
        assert {len(row) for row in csv.reader(file)} == {8}


@pytest.mark.parametrize("name", ["runs", "report", "inspect", "average", "missing file"])
def test_output_on_a_terminal(hostile: Path, name: str) -> None:
    controller, terminal = os.openpty()
    command = [Path(sys.executable).parent / "llmtrain", *COMMANDS[name]]
    variables = os.environ | {"TERM": "xterm", "COLUMNS": "400"}
    process = subprocess.Popen(
        command, cwd=hostile, env=variables, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    output = b""
    try:
        while part := os.read(controller, 65536):
            output += part
    except OSError:  # the command has ended
        pass
    assert process.wait() in (0, 2)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.decode().replace("\r\n", "\n"))
    assert text.strip()
    assert_safe(text.replace("\r", ""))

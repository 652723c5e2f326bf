"""Zero-shot tasks: scores computed by hand, equality with lm-eval's definitions, caching."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
import zstandard
from hub_server import HubServer
from in_process import Outcome, invoke
from places import SHARED_DATA
from tiny_models import write_neox, write_ours, write_tokenizer

from llmtrain.checkpoints.gpt2_folder import load_model
from llmtrain.checkpoints.resolve import find_targets
from llmtrain.config.schema import RunConfig
from llmtrain.errors import RunFailed, UserError
from llmtrain.evaluation.loss import measure_losses
from llmtrain.evaluation.options import EvalOptions, TaskOptions
from llmtrain.evaluation.results import Score, TaskResult
from llmtrain.evaluation.tasks import SHIPPED, find_definition, measure_tasks
from llmtrain.model.tokenizer import load_tokenizer
from llmtrain.training.run import pretrain

pytest.importorskip("lm_eval")

EVAL_DATA = SHARED_DATA / "eval"
needs_data = pytest.mark.skipif(not EVAL_DATA.is_dir(), reason="the evaluation data is missing")

PASSAGES = [
    "He closed the door, and then he opened the",
    "The sea was calm.\n\nOne bird crossed the sky, and nothing else moved but the",
    "They sang together until the night was over, and in the morning they slept",
    "Short is the",
]


def measured(folder: Path, settings: TaskOptions) -> list[TaskResult]:
    (results,) = measure_tasks(
        find_targets(folder, every_snapshot=False), settings, lambda *progress: None
    )
    return results


def scores(results: list[TaskResult]) -> dict[str, Score]:
    return {f"{score.task} {score.metric}": score for result in results for score in result.scores}


def write_passages(folder: Path) -> Path:
    folder.mkdir()
    lines = [json.dumps({"text": passage}) + "\n" for passage in PASSAGES]
    (folder / "lambada_openai.jsonl").write_text("".join(lines))
    return folder


@torch.no_grad()
def by_hand(folder: Path, tokenizer_name: str) -> list[tuple[float, bool]]:
    """Return log-likelihood and greedy match of the last word of each passage."""
    model, tokenizer = load_model(folder), load_tokenizer(tokenizer_name)
    answers = []
    for passage in PASSAGES:
        before = tokenizer.encode(passage.rpartition(" ")[0]).tolist()
        ids = tokenizer.encode(passage).tolist()
        assert ids[: len(before)] == before
        answer = ids[len(before) :]
        window = torch.tensor(ids[-(model.block_size + 1) :])
        logits = model.logits(window[None, :-1])[0].log_softmax(-1)[-len(answer) :]
        nats = sum(logits[i, token].item() for i, token in enumerate(answer))
        answers.append((nats, logits.argmax(-1).tolist() == answer))
    return answers


@pytest.mark.parametrize("block_size", [64, 12])
def test_lambada_equals_scores_computed_by_hand(block_size: int, tmp_path: Path) -> None:
    """A context of 12 tokens truncates all passages but one."""
    folder = tmp_path / "ours"
    model = write_ours(folder, vocab_size=50304, eot=50256, block_size=block_size)
    prefer(folder, model, int(load_tokenizer("gpt2").encode(" the")[0]))
    data = write_passages(tmp_path / "data")
    found = scores(measured(folder, TaskOptions(("lambada_openai",), data=data, device="cpu")))
    answers = by_hand(folder, "gpt2")
    mean = sum(nats for nats, _ in answers) / len(answers)
    assert [right for _, right in answers] == [True, True, False, True]
    assert found["lambada_openai acc"].value == 0.75
    assert found["lambada_openai acc"].stderr == pytest.approx(math.sqrt(0.75 * 0.25 / 3))
    assert found["lambada_openai perplexity"].value == pytest.approx(math.exp(-mean), rel=1e-4)
    assert found["lambada_openai perplexity"].documents == len(PASSAGES)
    assert found["lambada_openai perplexity"].stderr is not None


def prefer(folder: Path, model: Any, token: int) -> None:
    """Make one token the most likely almost everywhere."""
    from llmtrain.checkpoints.gpt2_folder import load_shape, save_tensors

    weights = dict(model.state_dict())
    row = weights["transformer.wte.weight"][token]
    weights["transformer.ln_f.bias"] = 60 * row / row.norm()
    save_tensors(folder / "model.safetensors", weights, load_shape(folder))


def test_an_answer_longer_than_the_context_is_split(tmp_path: Path) -> None:
    folder = tmp_path / "ours"
    write_ours(folder)  # 16 bytes of context
    passage = "It was the very incomprehensibilities"
    (tmp_path / "lambada_openai.jsonl").write_text(json.dumps({"text": passage}) + "\n")
    (result,) = measured(folder, TaskOptions(("lambada_openai",), data=tmp_path, device="cpu"))
    model, ids = load_model(folder), list(passage.encode())
    answer = len(" incomprehensibilities")
    nats = 0.0
    for end in (len(ids) - answer + 16, len(ids)):  # 16 bytes, and then the remaining 6
        new = 16 if end < len(ids) else answer - 16
        window = torch.tensor(ids[end - 17 : end])
        logits = model.logits(window[None, :-1])[0].log_softmax(-1)
        nats += sum(logits[i, window[i + 1]].item() for i in range(16 - new, 16))
    assert result.truncated == 1.0
    assert scores([result])["lambada_openai perplexity"].value == pytest.approx(
        math.exp(-nats), rel=1e-4
    )


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_definitions_equal_those_of_lm_eval(name: str, tmp_path: Path) -> None:
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    with zstandard.open(EVAL_DATA / f"{name}.jsonl.zst", "rt", encoding="utf-8") as documents:
        (tmp_path / f"{name}.jsonl").write_text("".join(islice(documents, 100)))
    ours = find_definition(name, TaskOptions((name,), data=tmp_path)).config
    assert isinstance(ours, dict)
    root = Path(lm_eval.tasks.__file__).parent
    (path,) = (
        p
        for p in root.glob(f"*/{name}.yaml" if name != "winogrande" else "winogrande/default.yaml")
    )
    local = {key: ours[key] for key in ("dataset_path", "dataset_kwargs", "test_split")}
    theirs = (
        load_yaml(path)
        | local
        | {"dataset_name": None, "training_split": None, "validation_split": None}
    )
    manager = TaskManager(include_defaults=False)
    built = []
    for config in (ours, theirs):
        task = manager.load([config])["tasks"][name]
        task.set_config(key="num_fewshot", value=0)
        task.build_all_requests()
        targets = [str(task.doc_to_target(document)) for document in task.eval_docs]
        metrics = (task.aggregation(), task.higher_is_better())
        built.append(
            ([(one.doc_id, one.idx, one.args) for one in task.instances], targets, metrics)
        )
    assert built[0] == built[1]
    assert len(built[0][1]) == 100


@pytest.mark.slow
@needs_data
def test_the_command_scores_six_tasks_offline(
    tiny: Callable[..., RunConfig],
    llmtrain: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
) -> None:
    run = pretrain(tiny(), tmp_path / "run", log=lambda line: None).run
    command = [
        "eval",
        run.average("ema-0.9", 12),
        "--tasks",
        ",".join(SHIPPED),
        "--task-data",
        EVAL_DATA,
    ]
    first = llmtrain(*command, "--limit", "3", "--json", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    raw, average = json.loads(first.stdout)
    assert (raw["label"], average["label"]) == ("raw", "ema-0.9")
    for document in (raw, average):
        assert [result["task"] for result in document["tasks"]] == list(SHIPPED)
        found = {
            score["metric"]: score for result in document["tasks"] for score in result["scores"]
        }
        assert set(found) == {"perplexity", "acc", "acc_norm"}
        assert all(
            score["documents"] == 3 and score["stderr"] is not None for score in found.values()
        )
    assert average["delta"] == average["loss"] - raw["loss"]
    files = {path: path.stat().st_mtime_ns for path in (run.evals / "tasks").iterdir()}
    assert len(files) == 2 * len(SHIPPED)
    again = invoke_without_lm_eval(*command, "--limit", "3", cwd=tmp_path)
    assert {path: path.stat().st_mtime_ns for path in files} == files
    for words in (
        "val: loss",
        "sciq: acc_norm ↑",
        "lambada_openai: perplexity ↓",
        "ema-0.9",
        "minus raw",
    ):
        assert words in again.stdout
    assert "the first 3 documents from sciq.jsonl.zst" in again.stdout


def invoke_without_lm_eval(*arguments: str | Path, cwd: Path) -> Outcome:
    """Run a command while importing lm-eval fails."""
    loaded = {
        name for name in sys.modules if name.startswith(("lm_eval", "llmtrain.evaluation.harness"))
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in {"lm_eval", "llmtrain.evaluation.harness", *loaded}:
            patch.setitem(sys.modules, name, None)
        return invoke(*arguments, cwd=cwd)


def test_an_hf_model_needs_its_tokenizer(tmp_path: Path) -> None:
    write_neox(tmp_path / "neox")
    settings = TaskOptions(
        ("lambada_openai",), data=write_passages(tmp_path / "data"), device="cpu"
    )
    with pytest.raises(UserError, match="no tokenizer files"):
        measured(tmp_path / "neox", settings)
    write_tokenizer(tmp_path / "neox", " ".join(PASSAGES))
    assert scores(measured(tmp_path / "neox", settings))["lambada_openai acc"].documents == len(
        PASSAGES
    )


@pytest.mark.slow
def test_task_files_run_only_when_trusted(tmp_path: Path) -> None:
    folder, files = tmp_path / "ours", tmp_path / "files"
    write_ours(folder)
    files.mkdir()
    data = write_passages(tmp_path / "data") / "lambada_openai.jsonl"
    task = {
        "task": "mine", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {"data_files": str(data)},
        "output_type": "loglikelihood", "doc_to_target": " the",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (files / "mine.yaml").write_text(yaml.safe_dump(task) + "doc_to_text: !function code.text\n")
    code = f"open({str(tmp_path / 'ran')!r}, 'w').close()\ndef text(doc): return doc['text']\n"
    (files / "code.py").write_text(code)
    with pytest.raises(UserError, match="are code"):
        measured(folder, TaskOptions(("mine",), files=files))
    assert not (tmp_path / "ran").exists()
    (result,) = measured(
        folder, TaskOptions(("mine",), files=files, trust_files=True, device="cpu")
    )
    assert (tmp_path / "ran").exists()
    assert scores([result])["mine acc"].documents == len(PASSAGES)
    with pytest.raises(UserError, match="cannot be combined"):
        measured(folder, TaskOptions(("mine",), files=files, data=tmp_path, trust_files=True))
    with pytest.raises(UserError, match="no task 'hellaswagg'") as caught:
        measured(folder, TaskOptions(("hellaswagg",), files=files, trust_files=True))
    assert "did you mean hellaswag" in caught.value.hint
    with pytest.raises(RunFailed, match="the task piqa cannot be loaded"):  # tests run offline
        measured(folder, TaskOptions(("piqa",), files=files, trust_files=True))


def test_documents_of_another_task_raise(tmp_path: Path) -> None:
    write_ours(tmp_path / "ours")
    settings = TaskOptions(("piqa",), data=tmp_path)
    with pytest.raises(UserError, match=r"contains no piqa\.jsonl"):
        measured(tmp_path / "ours", settings)
    row = {"goal": "g", "sol1": "a", "sol2": "b", "label": 0}
    for content in (
        json.dumps({"text": "x"}),
        json.dumps(row) + "\n" + json.dumps(row | {"goal": None}),
        json.dumps(row) + "\n" + json.dumps(row | {"label": 2}),
        "{",
        "",
    ):
        (tmp_path / "piqa.jsonl").write_text(content + "\n")
        with pytest.raises(UserError, match=r"piqa\.jsonl does not contain documents of piqa"):
            measured(tmp_path / "ours", settings)
    questions = [
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": k}
        for k in "AC"
    ]
    (tmp_path / "arc_easy.jsonl").write_text(
        "".join(json.dumps(question) + "\n" for question in questions)
    )
    with pytest.raises(UserError, match="document 2: "):
        measured(tmp_path / "ours", TaskOptions(("arc_easy",), data=tmp_path))
    with pytest.raises(UserError, match="has no task file for 'boolq'"):
        measured(tmp_path / "ours", TaskOptions(("boolq",), data=tmp_path))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--limit", "3"], "--limit requires --tasks"),
        (["--batch-size", "3"], "--batch-size requires --tasks"),
        (["--tasks", "piqa", "--trust-task-files"], "--trust-task-files requires --task-files"),
        (["--tasks", "piqa,"], "contains an empty name"),
        (["--tasks", "piqa", "--batch-size", "many"], "'many' is neither auto nor"),
        (["--stride", "8"], "--stride requires --text"),
    ],
)
def test_options_without_their_companion_raise(
    options: list[str], problem: str, tmp_path: Path
) -> None:
    write_ours(tmp_path / "ours")
    result = invoke("eval", tmp_path / "ours", *options, cwd=tmp_path)
    assert result.code == 2
    assert problem in result.stderr


@pytest.mark.slow
def test_model_and_task_from_the_hub(data_folder: Path, tmp_path: Path) -> None:
    """Use the real clients in a new process, because they read the address of the hub once."""
    revision = tmp_path / "step1000"
    write_neox(revision)
    write_tokenizer(revision, " ".join(PASSAGES))
    documents = write_passages(tmp_path / "lambada")
    (documents / "lambada_openai.jsonl").rename(documents / "test.jsonl")
    command = [
        "eval",
        "tiny/neox@step1000",
        "--data",
        data_folder,
        "--tasks",
        "lambada_openai",
        "--limit",
        "2",
    ]
    with HubServer() as hub:
        hub.add("model", "tiny/neox", {"step1000": revision})
        hub.add("dataset", "EleutherAI/lambada_openai", {"main": documents})
        run = subprocess.run(
            [sys.executable, "-m", "llmtrain", *command, "--json"],
            env=os.environ | hub.environment(tmp_path / "home") | {"HF_HUB_OFFLINE": "0"},
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    (row,) = json.loads(run.stdout)
    assert (row["label"], row["run"], row["block_size"]) == ("neox@step1000", None, 16)
    assert "has another tokenizer" in run.stderr
    (local,) = measure_losses(
        find_targets(revision, every_snapshot=False),
        EvalOptions(data=data_folder),
        lambda *done: None,
    )
    assert row["loss"] == pytest.approx(local.loss, rel=1e-6)
    assert (row["tokens"], row["weights"]) == (local.tokens, local.weights)
    (task,) = row["tasks"]
    assert (task["source"], task["limit"]) == ("hub", 2)
    assert [score["documents"] for score in task["scores"]] == [2, 2]

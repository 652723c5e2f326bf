"""transformers' pipeline generates text from every weights folder, as `llmtrain generate` does."""

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from tiny_training import Build, quiet

from llmtrain.api import AverageRequest, average
from llmtrain.storage.integrity import integrity_problems

PROMPT = "The people of"


@pytest.mark.slow
def test_a_pipeline_agrees_with_generate_for_every_weights_folder(
    tiny: Build, tmp_path: Path, llmtrain: Callable[..., CompletedProcess[str]]
) -> None:
    from transformers import pipeline

    checkpoint = {"snapshot_every": 20, "state_every": 20}
    averages = [{"kind": "ema", "decay": 0.9}]
    config = tiny(
        data__block_size=32, train__max_steps=60, checkpoint=checkpoint, averages=averages
    )
    run = quiet(config, tmp_path / "run")
    average(run.path, AverageRequest(every=20, window=2))
    (offline,) = run.averages.glob("lawa-*/step-00000060")
    folders = [run.snapshot(60), run.average("ema-0.9", 60), offline]
    for folder in folders:
        assert integrity_problems(folder) == []
        generate = pipeline("text-generation", str(folder), device="cpu")
        (made,) = generate(PROMPT, max_new_tokens=16, do_sample=False)
        ours = llmtrain(
            *("generate", folder, "--prompt", PROMPT, "--max-tokens", "16", "--temperature", "0"),
            cwd=tmp_path,
        )
        assert ours.returncode == 0, ours.stderr
        assert len(made["generated_text"]) > len(PROMPT)
        assert made["generated_text"] in ours.stdout
    files = [folder / "tokenizer.json" for folder in (run.tokenizer, *folders)]
    assert all(file.samefile(files[0]) for file in files)

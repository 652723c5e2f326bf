"""The compared training loops: ours and alternatives, on the same tokens and shape.

Each alternative is written the way its users write it, so that a reader can judge the comparison.

    side = plain(shape, folder, steps=3, name="plain"); side()
"""

import atexit
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.config.loading import load_config
from llmtrain.config.schema import ModelConfig, RunConfig
from llmtrain.data.token_data import open_training_data
from llmtrain.model.gpt import GPT
from llmtrain.planning.sizes import Architecture
from llmtrain.runtime.device import keep_freed_memory, peak_memory, resolve_device
from llmtrain.runtime.distributed import World
from llmtrain.runtime.signals import Interrupt
from llmtrain.storage.run_folder import RunFolder
from llmtrain.training.micro_batch import find_micro_batch
from llmtrain.training.trainer import Trainer
from llmtrain.training.worker import compile_model, make_worker

from .measure import Figures, Side, seconds
from .shapes import Shape

VOCABULARY = 50304
_RECIPE = Path(__file__).parents[2] / "configs" / "gpt2-small.yaml"


def config_of(shape: Shape, data: Path, settings: list[str]) -> RunConfig:
    """Return the config of a run with the shape on the tokens in `data`."""
    return load_config(
        _RECIPE,
        [
            f"data={{path: {data}, block_size: {shape.block}}}",
            f"model={{n_layer: {shape.n_layer}, n_head: {shape.n_head}, n_embd: {shape.n_embd}}}",
            f"train={{batch_sequences: {shape.batch}, micro_batch: {shape.batch}}}",
            "averages=[]",
            *settings,
        ],
    )


def step_of_ours(shape: Shape, data: Path, settings: list[str]) -> Callable[[], Tensor]:
    """Return a function that runs `Trainer.step` like `llmtrain pretrain` and returns the loss."""
    config = config_of(shape, data, settings)
    device = resolve_device("auto")
    worker = make_worker(config, World(), device, print)
    trainer = Trainer(worker, RunFolder(data / "run"), open_training_data(config.data))
    keep_memory(device)
    find_micro_batch(worker, trainer.progress, print)
    worker.forward = compile_model(worker, trainer.progress.micro_batch)
    interrupt = Interrupt(None)

    return lambda: trainer.step(interrupt)[0]


def keep_memory(device: torch.device) -> None:
    """Keep freed memory like training and evaluation do, until the process ends."""
    stack = ExitStack()
    stack.enter_context(keep_freed_memory(device))
    atexit.register(stack.close)


def ours(shape: Shape, data: Path, steps: int, settings: list[str]) -> Side:
    """Build the side of `llmtrain pretrain`."""
    return _timed(step_of_ours(shape, data, settings), steps, shape)


def plain(shape: Shape, data: Path, steps: int, name: str) -> Side:
    """Build the same model in eager float32 with whole logits and torch's default AdamW."""
    config = ModelConfig(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    device = resolve_device("auto")
    model = GPT(config, shape.block, seed=0).to(device)

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(model.logits(inputs).flatten(0, 1), targets.flatten())

    return _timed(_loop(model, loss, data, shape, device), steps, shape)


def transformers(shape: Shape, data: Path, steps: int, name: str) -> Side:
    """Build GPT2LMHeadModel in a plain float32 loop; its loss shifts the labels itself."""
    from transformers import GPT2Config, GPT2LMHeadModel

    device = resolve_device("auto")
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=shape.block,
        n_embd=shape.n_embd,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = GPT2LMHeadModel(config).to(device).train()

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        result: Tensor = model(input_ids=inputs, labels=inputs).loss
        return result

    return _timed(_loop(model, loss, data, shape, device), steps, shape)


def checkout(shape: Shape, data: Path, steps: int, name: str) -> Side:
    """Build nanoGPT's model.py from the folder `name` with the settings of its train.py."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", Path(name) / "model.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{name} has no model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    device = resolve_device("auto")
    config = module.GPTConfig(
        block_size=shape.block,
        vocab_size=VOCABULARY,
        n_layer=shape.n_layer,
        n_head=shape.n_head,
        n_embd=shape.n_embd,
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(config).to(device)
    optimizer = model.configure_optimizers(0.1, 6e-4, (0.9, 0.95), device.type)
    cuda = device.type == "cuda"
    forward = torch.compile(model) if cuda else model

    def loss(inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(
            device.type, torch.bfloat16, enabled=cuda
        ):  # nanoGPT's train.py uses float32 on a CPU
            result: Tensor = forward(inputs, targets)[1]
        return result

    return _timed(_loop(model, loss, data, shape, device, optimizer), steps, shape)


OTHERS: dict[str, Callable[..., Side]] = {"plain": plain, "transformers": transformers}


def matrix_products() -> Side:
    """Build the yardstick: the device's rate of bfloat16 products of square matrices."""
    device = resolve_device("auto")
    size = 8192 if device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))

    def once() -> Figures:
        return {"TFLOP/s": 20 * 2 * size**3 / seconds(lambda: left @ right, 20) / 1e12}

    return once


def flops_per_token(shape: Shape) -> int:
    """Return the model FLOPs per trained token, counted like `llmtrain pretrain`."""
    config = ModelConfig(n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd)
    return Architecture(config, shape.block).flops_per_token()


def _loop(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    data: Path,
    shape: Shape,
    device: torch.device,
    optimizer: torch.optim.Optimizer | None = None,
) -> Callable[[], Tensor]:
    """Return a step of a plain loop: zero, forward, backward, clip, step."""
    optimizer = optimizer or torch.optim.AdamW(
        model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1
    )
    batches = _batches(data, shape, device)

    def step() -> Tensor:
        inputs, targets = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def _batches(data: Path, shape: Shape, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield windows at random positions, like nanoGPT."""
    tokens, generator = np.memmap(data / "train.bin", np.uint16, "r"), np.random.default_rng(0)
    while True:
        starts = generator.integers(len(tokens) - shape.block, size=shape.batch)
        windows = np.stack([tokens[start : start + shape.block + 1] for start in starts]).astype(
            np.int64
        )
        both = torch.from_numpy(windows).to(device)
        yield both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _timed(step: Callable[[], Tensor], steps: int, shape: Shape) -> Side:
    """Return a side that runs this many steps: tokens per second and peak memory."""
    device = resolve_device("auto")

    def once() -> Figures:
        tokens = steps * shape.batch * shape.block
        return {"tokens/s": tokens / seconds(step, steps), "GB": peak_memory(device) / 1e9}

    return once

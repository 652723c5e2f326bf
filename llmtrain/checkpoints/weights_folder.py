"""What a folder of weights holds besides tensors: the names of its files and where it comes from.

Why apart from `checkpoint.py`: importing torch takes longer than averaging small checkpoints, and
whoever only asks for a folder's step or provenance should not pay for it. Nothing here needs torch.

    origin = load_origin(run.snapshot(1000))
"""

from dataclasses import dataclass
from pathlib import Path

from llmtrain.errors import UserError
from llmtrain.storage.json_files import read_json

WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
TRAINING_FILE = "training.json"
PROVENANCE_FILE = "provenance.json"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"


@dataclass(frozen=True)
class Origin:
    """Where in a training run weights come from."""

    step: int
    """Optimizer steps taken."""
    tokens: int
    """Tokens trained on so far."""
    lr: float
    """Learning rate of the last step."""
    run: str
    """Name of the run."""


_ORIGIN = {"step": int, "tokens": int, "lr": float, "run": str}


def load_origin(folder: Path) -> Origin | None:
    """Step, tokens and learning rate of a folder of weights; None where it does not say.

    Others write files of this name too; what is not ours says nothing.

    Raises:
        UserError: the file cannot be read.
    """
    path = folder / TRAINING_FILE
    if not path.exists():
        return None
    document = read_json(path)
    if {key: type(value) for key, value in document.items()} != _ORIGIN:
        return None
    return Origin(**document)


def weights_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder of weights: one, or the shards that its index names, by name.

    Raises:
        UserError: there is none, or the index names something else than files beside it.
    """
    index = folder / INDEX_FILE
    if not index.exists():
        if not (folder / WEIGHTS_FILE).is_file():
            raise UserError(
                f"{folder / WEIGHTS_FILE} is missing",
                hint="a folder of weights holds config.json and model.safetensors",
            )
        return [folder / WEIGHTS_FILE]
    placed = read_json(index).get("weight_map")
    values = list(placed.values()) if isinstance(placed, dict) else []
    names = sorted({name for name in values if isinstance(name, str) and Path(name).name == name})
    if (
        not names
        or set(names) != set(map(str, values))
        or not all((folder / n).is_file() for n in names)
    ):
        raise UserError(
            f"{index} does not name safetensors files beside it",
            hint="the folder is incomplete or not to be trusted",
        )
    return [folder / name for name in names]

"""Average windows of five checkpoints in the usual way: load and add whole state dicts.

Source: the loop of Sanyal et al. 2023 with safetensors instead of pickles.

    python plain_average.py TARGET INPUT INPUT INPUT INPUT INPUT ...
"""

import sys

from safetensors.torch import load_file, save_file

WINDOW = 5


def main(target: str, inputs: list[str]) -> None:
    """Write every window's mean to `target` in turn."""
    for first in range(len(inputs) - WINDOW + 1):
        total = load_file(inputs[first])
        for path in inputs[first + 1 : first + WINDOW]:
            for name, tensor in load_file(path).items():
                total[name] += tensor
        save_file({name: tensor / WINDOW for name, tensor in total.items()}, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

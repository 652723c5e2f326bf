"""The mean of windows of five checkpoints as it is usually written: whole state dicts, loaded and added.

Source: the loop of the code of Sanyal et al. 2023, with safetensors in place of pickles.

    python plain_average.py TARGET INPUT INPUT INPUT INPUT INPUT ...
"""

import sys

from safetensors.torch import load_file, save_file

WINDOW = 5


def main(target: str, inputs: list[str]) -> None:
    """Write every window's mean to `target`, one after the other."""
    for first in range(len(inputs) - WINDOW + 1):
        total = load_file(inputs[first])
        for path in inputs[first + 1 : first + WINDOW]:
            for name, tensor in load_file(path).items():
                total[name] += tensor
        save_file({name: tensor / WINDOW for name, tensor in total.items()}, target)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

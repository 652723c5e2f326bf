"""Averaging weights: how much of each checkpoint goes into an average. Pure functions of numbers.

Why apart: what a method *is* fits in a line of algebra and is tested as such; how tensors are read
and summed is the same for all of them (`merge.py`).

    uniform(5)  # [0.2, 0.2, 0.2, 0.2, 0.2]

Every function gives one weight for each checkpoint, oldest first; they sum to 1.
"""


def uniform(window: int) -> list[float]:
    """LAWA, the mean of the last k checkpoints: c_i = 1/k.

    Source: Kaddour 2022, "Stop Wasting My Time!" (arXiv 2209.14981); Sanyal et al. 2023
    (arXiv 2306.03241), with k = 5 in their code.
    """
    return [1.0 / window] * window

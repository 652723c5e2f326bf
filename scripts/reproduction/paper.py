"""Curves digitised from the paper's figure, drawn next to ours.

Source: Sanyal et al. 2023 (arXiv 2306.03241), validation loss of GPT-2 small on OpenWebText,
±0.002.

    gain_by_share("6e-3")[0]  # (8.57 % of the run, 0.116 nats)
"""

STEPS = 70_000
_AT = (6_000, 10_000, 20_000, 30_000, 40_000, 50_000, 54_000)
_RAW = {
    "6e-3": (3.301, 3.270, 3.199, 3.145, 3.100, 3.029, 3.015),
    "6e-4": (3.322, 3.213, 3.105, 3.036, 2.998, 2.987, 2.964),
}
_LAWA = {
    "6e-3": (3.185, 3.149, 3.078, 3.049, 3.013, 2.981, 2.969),
    "6e-4": (3.259, 3.155, 3.042, 3.000, 2.983, 2.965, 2.960),
}
RATES = tuple(_RAW)
"""Ten times the tuned peak learning rate, and the tuned one."""


def gain_by_share(rate: str) -> list[tuple[float, float]]:
    """(percent of the run, raw loss minus LAWA's)."""
    losses = zip(_AT, _RAW[rate], _LAWA[rate], strict=True)
    return [(100 * step / STEPS, raw - lawa) for step, raw, lawa in losses]

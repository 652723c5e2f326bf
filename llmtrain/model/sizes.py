"""Sizes at which the model cuts up its work, on which the memory of a step depends.

Why apart from the model: a plan is made of them too, and needs no torch.

    rows_per_chunk(16_384, 50_304, item=2, kind="cpu")
"""

import math

SHORT = 1024
"""Up to this length a CPU multiplies bfloat16 matrices whole faster than torch's fused attention takes its tiles.
Beyond, where it gains a quarter at most, attention weights would take more memory than all else."""
BYTES_OF_WEIGHTS = 64 * 2**20
"""Of the attention weights of so many sequences as are taken at a time where none are kept for a backward pass."""
BYTES_OF_CHUNK = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Of the logits of a chunk: large enough for a fast matrix product, small beside everything else."""
BYTES_IN_CACHE = 4 * 2**20
"""Of the float32 logits that a CPU turns into gradients at a time."""
ROWS_OF_SLAB = {"cpu": 4192}
"""Of the weight's gradient that are added up at a time, a twelfth of 50304; on a GPU, all."""


def rows_per_chunk(rows: int, vocabulary: int, *, item: int, kind: str) -> int:
    """How many of `rows` the head takes at a time: as many as their logits may take, in chunks of one size.

    Args:
        rows: tokens in a micro-batch.
        vocabulary: logits a row.
        item: bytes of a logit.
        kind: of the device, as torch names it.
    """
    limit = BYTES_OF_CHUNK.get(kind, 2**26) // (vocabulary * item)
    return math.ceil(rows / math.ceil(rows / max(limit, 1)))


def sequences_at_a_time(weights: int) -> int:
    """Sequences whose attention is computed together where no weights are kept.

    Args:
        weights: bytes of the attention weights of one sequence.
    """
    return max(BYTES_OF_WEIGHTS // weights, 1)


def rows_in_cache(vocabulary: int) -> int:
    """Rows of logits that a CPU turns into gradients at a time."""
    return max(BYTES_IN_CACHE // (4 * vocabulary), 1)


def rows_per_slab(vocabulary: int, kind: str) -> int:
    """Rows of the weight's gradient that are added up at a time."""
    return min(ROWS_OF_SLAB.get(kind, vocabulary), vocabulary)

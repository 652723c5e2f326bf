"""Chunk sizes of attention and loss, also for memory estimates, which do not import torch."""

import math

MAX_MATERIALIZED_LENGTH = 1024
"""Context length up to which a CPU materializes bfloat16 attention, faster than torch's fused
kernel. For longer contexts the kernel is at most 25% slower and saves most of the memory."""
ATTENTION_BYTES = 64 * 2**20
"""Attention weights that exist at a time if no backward pass needs them."""
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}
"""Logits of a chunk: enough for a fast matrix product, few compared with the other tensors."""
CACHE_BYTES = 4 * 2**20
"""float32 logits that a CPU turns into gradients at a time, which fit into its cache."""
SLAB_ROWS = {"cpu": 4192}
"""Rows of the weight gradient accumulated at a time (a twelfth of 50304); on a GPU all of them."""


def rows_per_chunk(rows: int, vocabulary: int, *, itemsize: int, device_type: str) -> int:
    """Return how many of the `rows` of logits a chunk has, for chunks of equal size."""
    limit = CHUNK_BYTES.get(device_type, 2**26) // (vocabulary * itemsize)
    return math.ceil(rows / math.ceil(rows / max(limit, 1)))


def sequences_per_chunk(weight_bytes: int) -> int:
    """Return the sequences in a chunk of attention, given the attention weights' bytes of one."""
    return max(ATTENTION_BYTES // weight_bytes, 1)


def rows_in_cache(vocabulary: int) -> int:
    """Return the rows of logits that a CPU turns into gradients at a time."""
    return max(CACHE_BYTES // (4 * vocabulary), 1)


def rows_per_slab(vocabulary: int, device_type: str) -> int:
    """Return the rows of the weight gradient that are accumulated at a time."""
    return min(SLAB_ROWS.get(device_type, vocabulary), vocabulary)

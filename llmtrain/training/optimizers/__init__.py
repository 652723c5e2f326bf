"""Optimizers: one file each, named like `optimizer.name` in the configuration.

To add an optimizer NAME:

1. Write `NAME.py` with a subclass of `adamw.AdamW` and a function `build(model, config)`.
2. Add NAME, and a section for its own keys, to `OptimizerConfig` in `llmtrain/config/schema.py`;
   describe the keys in `configs/README.md` and `configs/demo.yaml`.
3. Write one test, `tests/training/test_NAME.py`.
4. If it stores other moments than AdamW, count them in `llmtrain/planning/sizes.py`.

The loop, training checkpoints and spike handling need no change.
Allowed imports: `config`, `runtime`.

- `adamw.py`: AdamW with clipping, updates skipped on the device, and weight-decay groups
- `muon.py`: Muon for the matrices of the blocks, AdamW for all other parameters
- `spam.py`: AdamW that clips spiking gradients and resets its moments
"""

import importlib

from torch import nn

from llmtrain.config.schema import OptimizerConfig
from llmtrain.training.optimizers.adamw import AdamW


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> AdamW:
    """Build the optimizer named in the configuration."""
    module = importlib.import_module(f"{__name__}.{config.name}")
    optimizer: AdamW = module.build(model, config)
    return optimizer

"""llmtrain: pre-train GPT-2 models at high learning rates, then average the checkpoints of the run.

What the commands do can be done from Python with the same names; nothing heavy is imported here.

    from llmtrain.config.loading import load_config
    from llmtrain.training.run import pretrain
"""

__version__ = "0.1.0"

"""llmtrain: pre-train GPT-2 at high learning rates, then average the checkpoints of the run.

The commands are available as functions in `llmtrain.api`. Packages, top layer first:

export       publish weights
training     train a model
planning     estimate time, memory and storage before a run
averaging    average checkpoints
evaluation   measure losses and tasks, generate text, write reports
data         prepare token shards and sample batches
checkpoints  find, read and write weights
model        GPT-2 and its tokenizer
config       typed configuration
runtime      devices and processes
storage      files, run folders and the hub
"""

__version__ = "0.1.0"

"""Weights on disk from any source: open, read byte ranges, write. No averaging.

May import model, config, runtime, storage and errors. Files, from the lowest:

    tensors.py            dtype and shape of a stored tensor; conversion to float64 and rounding back
    checkpoint.py         `Checkpoint` and `Reader`, below every format; names of files; shard indexes
    safetensors_files.py  format: safetensors, read without torch
    gpt2_folder.py        Hugging Face GPT-2 layout: save and load our model; transposes and biases
    torch_files.py        format: pytorch_model.bin, and .pt files of nanoGPT and similar trainers
    open.py               `open_checkpoint` and `FORMATS`, the list of formats
    windows.py            windows of steps (pure arithmetic)
    series.py             the checkpoints of a run or folder by step
    hub.py                the same for the revisions of a Hugging Face repository
    resolve.py            decide what a word names: run, weights, folder of checkpoints, repository
    writer.py             write an average chunk by chunk

To add a checkpoint format:

1. Write one file with a function `(path, step, location) -> Checkpoint`. It reads only headers and
   gives the checkpoint a reader of element ranges. Use the names of a Hugging Face model.
2. Add one line to `FORMATS` in `open.py`: the file names or suffixes that identify the format, and
   the function as `module:function`. Formats are imported only when they match, because averaging
   small safetensors must not import torch (a second).
3. Add one test to `tests/checkpoints/`.

Series, `inspect`, `average` and `init_from` then accept the format.
"""

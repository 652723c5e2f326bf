"""Weights on disk from any source: open, read byte ranges, write. No averaging.

May import model, config, runtime, storage and errors. Files, from the lowest:

    tensors.py            dtype and shape of a stored tensor; exact conversion to and from float64
    checkpoint.py         `open_checkpoint`, `Checkpoint`, `Reader`, `FORMATS`; shard indexes
    safetensors_files.py  format: safetensors, read without torch
    gpt2_folder.py        Hugging Face GPT-2 layout: save and load our model; transposes, biases
    torch_files.py        format: pytorch_model.bin, and .pt files of nanoGPT and similar trainers
    windows.py            windows of steps (pure arithmetic)
    series.py             the checkpoints of a run or folder by step
    hub.py                the revisions of a Hugging Face repository by step
    resolve.py            find the run, path or repository that a word names
    writer.py             write an average chunk by chunk

To add a checkpoint format:

1. Write one file with a function `(path, step, location) -> Checkpoint`. It reads only headers, and
   gives the checkpoint a `Reader`. Name the tensors as the Hugging Face model does.
2. Add one entry to `FORMATS` in `checkpoint.py`: the file name and suffixes that identify the
   format, and the function. `average`, `inspect` and `init_from` then accept the format.
3. Add one test to `tests/checkpoints/`.

A format's module is imported only when a file matches, because importing torch takes longer than
averaging small safetensors files.
"""

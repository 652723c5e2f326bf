"""Weights on disk from any source: open, read byte ranges, write. No averaging.

May import model, config, runtime, storage and errors. Files, from the lowest:

    tensors.py            dtype and shape of a stored tensor; exact conversion to and from float64
    checkpoint.py         `Checkpoint`, `Reader`, names of files, shard indexes
    safetensors_files.py  format: safetensors, read without torch
    gpt2_folder.py        Hugging Face GPT-2 layout: save and load our model; transposes, biases
    shared_files.py       tokenizer files of a run, linked into each of its weights folders
    torch_load.py         load a file of torch without running code
    state_dicts.py        find the weights in a training file, and check the tensors
    nanogpt.py            files of nanoGPT and build-nanogpt as GPT-2
    torch_files.py        format: pytorch_model.bin, and training files of other trainers
    windows.py            windows of steps (pure arithmetic)
    step_names.py         the step in the name of a checkpoint
    open.py               `open_checkpoint`, `FORMATS`
    series.py             the checkpoints of a run or folder by step
    hub.py                the revisions of a Hugging Face repository by step
    resolve.py            find the run, path or repository that a word names
    writer.py             write an average chunk by chunk

To add a checkpoint format:

1. Write a file with a function `(path, step, location) -> Checkpoint`, which reads only headers.
   Name the tensors as the Hugging Face model does.
2. Add an entry to `FORMATS` in `open.py`, and a test to `tests/checkpoints/`. For public
   series, add its file names to `hub.py`.
"""

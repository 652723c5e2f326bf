"""Checkpoint averages: methods, streaming merge, checks of the inputs, online averages, sweep.

Imports from evaluation, data, checkpoints, model, config, runtime, storage and errors. Training
imports `online`; the command line imports `request`, which loads neither numpy nor torch.

To add a method: write a function in `coefficients.py` from the number of checkpoints to their
weights, add one line to `request.METHODS`, and add one case to `REQUESTS` in
`tests/averaging/test_methods.py` and one row to README.md. A parameter of the method is a field of
`AverageRequest` and an option in `cli/average.py`. To add an online average: add a class in
`online.py` and its section in `llmtrain/config/sections.py`.

Files:
    request.py          options of the command, and the methods with the options they accept
    coefficients.py     averaging weights as pure functions
    make_specs.py       from a request to specs
    stored_averages.py  specs of averages that a run stored (dense, posthoc-ema)
    spec.py             one average to make, its provenance, and its comparison with a folder
    trajectory.py       the check for weights of another step or run
    audit.py            hashes and checks of the inputs; known_bad.json lists public defects
    merge.py            the streaming merge
    average.py          all phases from specs to folders, also with one input on disk at a time
    online.py           averages that a run updates while training
    sweep.py            evaluate many averages without writing them
    inspection.py       facts about checkpoints for `llmtrain inspect`
"""

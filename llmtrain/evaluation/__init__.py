"""Evaluation: losses on fixed windows, text files, zero-shot tasks, generation and reports.

May import data, checkpoints, model, config, runtime, storage and errors.

    options.py     options of all measurements and of sampling; source of the help texts
    results.py     results, cached under a run's evals/
    curves.py      validation losses of a run by step, grouped by the tokens they were measured on
    selection.py   the weights that generate and export use
    weights.py     digests of weights; averages whose inputs a run has discarded
    loss.py        loss on a split
    text.py        loss and perplexity on a text file
    tasks.py       zero-shot tasks: definitions, trust, cached scores
    harness.py     scoring with lm-eval, imported only when a score is computed
    hf_models.py   models and tokenizers loaded with transformers
    generation.py  text generation with a key-value cache
    task_files/    definitions of six tasks for local data
    report/        tables, charts and the HTML page of a run
"""

"""Prepare token shards from documents, and read training batches from them.

May import checkpoints, model, config, runtime, storage and errors.

A document flows through `sources` -> `readers` -> `encode` -> `shards` -> `storage.commit`, called
in this order by `prepare`. A batch comes from `dataloader`, in the order that `sampler` computes.

- options.py: options of `llmtrain prepare`
- prepare.py: the steps of a preparation: count, split, encode, write, commit
- sources.py: files, globs, URLs, hub datasets and corpus packages as a list of files
- readers.py: files divided into partitions; the documents of a partition
- encode.py: documents counted and encoded by threads; the engine interface
- ray_engine.py: the engine for a Ray cluster
- shards.py: the file format: writer and random-access reader
- manifest.py: `manifest.json` and its records
- staging.py: the temporary folder of a preparation and the journal of its finished shards
- cache.py: local copies of data behind URLs
- shard_check.py: shards compared with their recorded hashes in the background
- token_data.py: an opened data folder, its splits, nanoGPT's files, mixtures
- sampler.py: the data order as a pure function of the step, without torch
- dataloader.py: micro-batches, read ahead by a thread
- verify.py: every byte of data, weights and runs against the recorded hashes

To add a data filter: apply a function from documents to documents in `encode.read_documents`, which
both counting and encoding use; `count_documents` must then ignore the files' metadata. Record the
filter's parameters in `manifest.PrepareSpec`, because data and interrupted preparations are reused
only for an equal spec; leave a parameter that is not set out of the manifest, whose hash earlier
data has recorded. Add the option to `options.py` and `cli/prepare.py`, and a test.
"""

"""GPT-2 and its tokenizer. Imports config, storage and errors.

gpt.py            the model
cross_entropy.py  chunked output layer and loss
chunk_sizes.py    sizes of the chunks, also for memory estimates without torch
tokenizer.py      GPT-2 and byte tokenizers, and their Hugging Face files
"""

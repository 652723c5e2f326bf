"""Publishing of trained weights. May import all other packages.

publish.py           Hugging Face repository or nanoGPT's ckpt.pt
model_card.py        model card of a repository, from the records of the run
model_card.md.jinja  its template
"""

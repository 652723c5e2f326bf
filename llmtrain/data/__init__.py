"""Everything `llmtrain prepare` does: documents, tokens, shards, and the order they are trained in."""

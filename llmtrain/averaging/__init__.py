"""Everything `llmtrain average` does: coefficients, checkpoint series and the streaming merge."""

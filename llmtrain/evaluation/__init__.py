"""Everything `llmtrain eval` does: losses on fixed windows, tables and plots."""

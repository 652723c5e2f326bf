"""Everything `llmtrain pretrain` does: the loop, its state, schedules, optimizers and metrics."""

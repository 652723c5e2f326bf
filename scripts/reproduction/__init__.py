"""The parts of the scripts/reproduce_* experiments: their commands, execution and results."""

"""The parts of scripts/reproduce_cpu and its like: which commands, how they are run, what is made of their results."""

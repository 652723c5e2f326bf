"""The commands of `scripts/bench`: one module per command, and the measuring itself."""

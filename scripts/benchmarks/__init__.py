"""What `scripts/bench` measures: a module for each of its commands, and how a measurement is made."""

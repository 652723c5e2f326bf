"""Costs of a run before it starts, and checks of the machine.

May import `averaging` and the layers below it.

- `hardware.py`: options that describe devices and links
- `sizes.py`: parameters, FLOPs, activation bytes and disk usage of a run
- `memory.py`: memory of one device at each moment of a step
- `estimate.py`: hours, communication and averaging; everything that `llmtrain plan` prints
- `doctor.py`: the checks of `llmtrain doctor`
"""

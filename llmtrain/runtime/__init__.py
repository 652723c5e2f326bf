"""Devices, the processes of a run, and signals.

May import: storage, errors.

- contention: detect other processes that slow the compute threads down.
- device: device, precision, compilation, memory.
- distributed: the process group and collective helpers.
- hardware: published figures of devices, and the cores of this machine.
- launcher: start the workers of a run, and print each error once.
- sharded: shards and full tensors of a DTensor.
- signals: stop at a safe point after a signal or a time limit.
"""

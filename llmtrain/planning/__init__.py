"""What a run will cost, from its configuration alone: parameters, memory, disk, hours, communication."""

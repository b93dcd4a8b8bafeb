"""What a meta-gradient costs in time and memory, beside higher, TorchOpt and hand-written loops.

- `lineup`: the cases and the contenders, as data; imports no torch.
- `problem`: a case as a model and tasks. `contenders`: each way to its meta-gradient.
- `end_to_end`: a whole meta-iteration around it, from image files.
- `worker`: one measurement, in a process of its own.
- `command`, `measure`, `report`: the command line, the order of measurements, the tables.
"""

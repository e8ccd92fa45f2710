"""Compares two checkpoints, and what each of them has changed in a common base.

Each module imports only modules above it::

    sums      what is counted and summed, and what follows from it
    numbers   the same for the numbers of one tensor, chunk by chunk
    pairs     which tensors are compared, and what only one side has
    result    what was found, by tensor, layer and model
    comparing reads both checkpoints once
"""

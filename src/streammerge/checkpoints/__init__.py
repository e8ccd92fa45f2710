"""One model, found and described from its headers.

Each module imports only modules above it::

    numbers      what a name says: step, epoch, metrics
    globs        paths and globs, in the order of their numbers
    duplicates   paths that are one checkpoint
    metrics      numbers beside a checkpoint
    index        CheckpointIndex
    agreement    the same copy of the weights in every input
    profiles     programs whose loaders ignore some tensors
    in_memory    state dicts that the caller holds
    huggingface  config.json and tied heads
    choosing     the last, a range, the best
    conversions  inputs converted to safetensors first
"""

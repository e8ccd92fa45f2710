"""One model, found and described from its headers.

Each module imports only modules above it::

    numbers      what a name says: step, epoch, metrics
    globs        paths and globs, in the order of their numbers
    duplicates   paths that are one checkpoint
    metrics      numbers beside a checkpoint
    index        CheckpointIndex
    huggingface  config.json and tied heads
    choosing     the last, a range, the best
    conversions  inputs converted to safetensors first
"""

"""One model, found and described from its headers.

Each module imports only modules above it::

    globs        paths and globs in numeric order
    index        CheckpointIndex
    profiles     programs whose loaders ignore some tensors
    in_memory    state dicts that the caller holds
    huggingface  config.json and tied heads
    choosing     the last, a range, the best
    conversions  inputs converted to safetensors first
"""

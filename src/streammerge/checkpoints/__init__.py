"""One model, found and described from its headers.

Each module imports only modules above it::

    globs        paths and globs in numeric order
    index        CheckpointIndex
    profiles     programs whose loaders ignore some tensors
    huggingface  config.json and tied heads
    choosing     the last, a range, the best
    conversions  inputs converted to safetensors first
"""

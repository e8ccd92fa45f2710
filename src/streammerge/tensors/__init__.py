"""What a tensor is, and what its name tells.

Each module imports only modules above it::

    dtypes       element types and their names in safetensors and torch
    spec         TensorSpec, shapes, ranges of elements
    conventions  what programs agree on about names: data
    names        one name for each tensor; buffers that loaders ignore; counters
    matching     which tensor of one checkpoint is which of another
    layers       a tensor's layer, and its place outside the layers
    quantised    tensors that indicate a quantisation
    adapters     factors of adapters
    instructions which vector instructions numpy sorts with
    threads      torch without helper threads on the caller's thread
"""

"""What a tensor is, and what its name tells.

Each module imports only modules above it::

    dtypes     element types and their names in safetensors and torch
    spec       TensorSpec, shapes, ranges of elements
    names      wrapper prefixes
    layers     a tensor's layer, and its place outside the layers
    quantised  which tensors tell of a quantisation
    threads    torch without helper threads on the caller's thread
"""

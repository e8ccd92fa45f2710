"""Facts about tensors: dtypes, shapes, places of bytes, and meanings of names.

Each module imports only modules above it::

    dtypes     element types and their names in safetensors and torch
    spec       TensorSpec, shapes, ranges of elements
    names      wrapper prefixes
    layers     a tensor's layer, and its place outside the layers
    quantised  tensors that indicate a quantisation
    threads    torch without helper threads on the caller's thread
"""

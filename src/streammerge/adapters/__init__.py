"""Adapters: what they say, which tensors of a base it is about, and the base with it.

Each module imports only modules above it::

    dialects   what programs agree on about adapters' names and configurations: data
    layouts    other names of the same tensors: the two layouts of diffusion models
    config     PEFT's configuration
    modules    the factors of each module that an adapter changes
    names      which tensors of a base a module is
    updates    what factors make of a tensor
    experts    adapters of experts, one by one or fused
    applying   a base with adapters
"""

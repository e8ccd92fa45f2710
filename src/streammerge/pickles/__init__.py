"""Inert trees: what a pickle says, as plain data. Nothing in it is imported or executed.

Each module imports only modules above it::

    tree        plain values and records
    rebuild     torch's calls in a pickle -> tensors and storages
    unpickle    bytes of a pickle -> tree
    repickle    tree -> bytes of a pickle
    state_dict  which tensors of a tree are the weights
"""

"""Inert trees: the content of a pickle as plain data. Nothing in a pickle is imported or executed.

Each module imports only modules above it::

    tree        plain values and records
    arrays      numpy's arrays, whose bytes lie in the pickle
    rebuild     torch's calls in a pickle -> tensors and storages
    unpickle    bytes of a pickle -> tree
    storages    torch's storages whose bytes lie in the pickle
    repickle    tree -> bytes of a pickle
    state_dict  selection of the weights in a tree
    copies      what a tree holds beside them
"""

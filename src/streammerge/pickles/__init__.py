"""Inert trees: the content of a pickle as plain data. Nothing in a pickle is imported or executed.

Each module imports only modules above it::

    tree            plain values and records
    arrays          numpy's arrays, whose bytes lie in the pickle
    rebuild         torch's calls in a pickle -> tensors and storages
    unpickle        bytes of a pickle -> tree
    storages        torch's storages whose bytes lie in the pickle
    repickle        tree -> bytes of a pickle
    training_state  what is no weights: the state of a training, records
    candidates      the state dicts of a tree
    state_dict      which of them are the weights
    copies          what a tree holds beside them
"""

"""Checks whether an output agrees with its receipt.

Each module imports only modules above it::

    files     structure and checksums
    values    a sample of the values, computed again
    factors   a sample of an adapter's factors, computed again
    lineage   the tree of a merge of merges
    attempts  where the inputs are, and what to say if the values cannot be computed
"""

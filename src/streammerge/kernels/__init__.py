"""What a merge method sees, and the numerics behind it. No file, no offset, no budget.

Each module imports only modules above it::

    random       random numbers by counter
    ranking      cuts, sort keys, ranks in rows: arithmetic on tensors in memory
    chunk        the numbers of every model at some elements
    reductions   sums over a group, in one pass
    kth_largest  exact order statistics of a group, in a few passes
    group        the same-named tensors of all models
"""

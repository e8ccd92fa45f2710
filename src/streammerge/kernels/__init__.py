"""The view of tensors that a merge method gets, and its numerics. Independent of files, offsets and budgets.

Each module imports only modules above it::

    adding       multiples that are added in one operation, the same on every machine
    random       counter-based random numbers
    ranking      cuts and sort keys: arithmetic on tensors in memory
    row_ranking  ranks of numbers within rows
    agreed       infinities and NaN that all inputs have
    chunk        the numbers of every model at some elements
    places       where numbers lie, for compiled functions
    lanes        sums in one order on every machine
    reductions   sums over a group, in one pass
    batch        small tensors of equal shape, computed together
    compact      a matrix in half the memory of float64
    spill        matrices beside memory, and halves of symmetric ones
    masks        masks beside memory
    tridiagonal  the first eigenvectors of a large symmetric matrix
    spectral     products of matrices over a group, and eigenvectors
    kth_largest  exact order statistics of a group, in a few passes
    pass_results results of passes, from which a kernel can be made elsewhere
    group        the same-named tensors of all models
"""

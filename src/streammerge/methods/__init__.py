"""The merge methods, one file per family.

Each module imports only modules above it. A family that no other module uses is not listed::

    contracts        requirements of a method; the decorator
    linear           weighted means, and the weighted sum that other families end in
    exact            copies, and integers by policy
    spherical        weighted sums whose weights follow from the models' inner products
    sparsify         selection of the elements of a delta; no method of its own
    task_arithmetic  sums of deltas: the TIES family
    registry         lookup of a method by name, or of a function
"""

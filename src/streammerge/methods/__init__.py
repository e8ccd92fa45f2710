"""The merge methods, one file per family.

Each module imports only modules above it. A family that no other uses is not listed::

    contracts        what a method asks for; the decorator
    linear           weighted means, and the weighted sum that other families end in
    exact            copies, and integers by policy
    spherical        weighted sums whose weights follow from the models' inner products
    sparsify         which elements of a delta are kept; no method of its own
    task_arithmetic  sums of deltas: the TIES family
    registry         from a name, or a function, to a method
"""

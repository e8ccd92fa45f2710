"""What a merge will do, from headers alone. Pure: no tensor is read.

Each module imports only modules above it::

    budget      the memory model
    tasks       tasks, pieces, batches
    receipt     what an output says of how it was made
    views       models, slices and modules as views of checkpoints
    parameters  a method's parameters for each tensor
    mismatch    what checkpoints disagree about
    alignment   which tensors go into which tensor of the output
    outputs     the output before it exists
    plan        Plan, build_plan
    digest      whether two plans are the same
"""

"""Plans a merge from headers alone. Pure: no tensor is read.

Each module imports only modules above it::

    budget        the memory model
    aligned       the tensors of the output, and from what each is made
    tasks         tasks, pieces, batches
    receipt       the record in an output of how it was made
    views         models, slices and modules as views of checkpoints
    tokenizers    the tokens of the output
    vocabularies  rows of embeddings in the order of the output's tokens
    dispositions  what becomes of each thing in an input
    parameters    a method's parameters for each tensor
    mismatch      differences between checkpoints
    ruled         which rule takes which tensor
    matched       which tensor of another checkpoint goes with which of the first
    missing       tensors that not all checkpoints have
    experts       fused experts as separate ones, and the other way round
    shapes        tensors whose shapes or kinds of numbers differ
    refusals      tensors that no method may merge
    alignment     which tensors go into which tensor of the output
    like_base     codes and scales in place of weights that the first stores so
    copies        the same for the copies of the weights
    conservation  what becomes of each tensor of each input
    outputs       the files of the output, and the place of each tensor
    announced     what configurations say of the tensors
    repeated      tensors that a task reads more than once
    staying       how much of each of them stays in memory
    summed        tensors whose many models are summed by products
    plain         tensors that need no torch
    costs         the memory that tasks take
    plan          Plan, build_plan
    unwritten     files that are planned and not written
    stages        a planned merge as a model of another one
    mixtures      a mixture of experts as a model
    digest        whether two plans are the same
    units         the work of a plan, cut and shared out
    saved         a plan as data
"""

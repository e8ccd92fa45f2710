"""Sources: a tensor as a small expression, and the readers that give its numbers.

A source is frozen plain data. Opened by a worker it becomes a reader. Sources nest. A new kind of source is one file here.
Each module imports only modules above it::

    base      the protocol: Source, Reader, Blob, Needs, Room
    stored    a byte range in C order
    table     many of them, as columns
    strided   a view of a storage, gathered where it lies
    deflated  a packed record, which is unpacked into a temporary file first
    rows      some rows of a source
    mean_row  the mean of all rows of a source
    reshaped  the same elements in another shape
    joined    pieces along one axis
    constant  one number everywhere
    inline    a small tensor that stands in a header
    affine    quantised tensors of torch
    memory    a tensor that the caller holds
    box       a block, or a transposed matrix, of a tensor
    turned    a tensor whose first axis comes last
    wide      numbers of a source in float64
    recast    numbers in another floating-point dtype
    narrow    numbers of eight bits in float32
    scaled    quantised weights with a scale for each block
    requantised  numbers as codes with scales again
    unpacked  numbers of few bits that lie packed
    swizzled  a grid of scales in the order of cuBLAS
    mxfp4_experts  experts of gpt-oss
    codebooks vectors that short codes of ggml stand for
    ggml      weights in the blocks of ggml
    contracted  a small tensor computed whole from others
    permuted  axes in another order; another shape
    product   the product of two matrices
    kronecker the Kronecker product of two
    elementwise sums and products element by element
    rescaled  slices multiplied by numbers of their own, or given a norm
    residual  a matrix without its strongest part
    merged    a merge of other sources, computed chunk by chunk
    remembered what is read several times
    drawn     random numbers
    directions directions of sums of rows
"""

"""Makes an output.

Each module imports only modules above it::

    process    memory of this process, the garbage collector
    workspace  a worker's buffers, and the numbers of its inputs
    executors  executors, which run tasks on workers
    choosing   the choice of the executor for a plan
    job        what all works of one run share
    masking    room for masks between the passes and the kernel
    nonfinite  NaN and infinity in results, by input
    sampling   which elements of a piece are measured
    measuring  how far results lie from inputs
    announcing what workers read next
    prefetching local inputs, asked of the system ahead of the workers
    head_start the beginnings of local inputs, asked for while a merge is planned
    makers     what makes the bytes of a tensor, chunk by chunk
    copying    tensors whose bytes are copied
    computing  tensors by the kernel of their method
    summing    weighted sums of many models, as products
    compiled   weighted sums by compiled functions
    plain      weighted sums without torch
    tiles      weighted sums of several outputs, from numbers that are converted once
    worker     units of a merge, from inputs to written bytes
    sweeping   steps of a pass over a long tensor
    engine     gives all tensors of a run to workers
    turning    makes tensors with their first axis last in a temporary file
    reading    checksums and hashes of files, computed by workers
    spooling   unpacks packed records into a temporary file
    finished   the finished pieces of a run
    sealing    bytes outside tensors, as soon as they are known
    relatives  whether inputs come from one training
    readback   whether an output can be read back
    session    makes one output in its staging folder
    execution  runs a plan to its end
    unit_receipts  what is known of a unit that a machine has made
    sending    files that machines send to a store
    exchanging passes over a long tensor that several machines make
    shared     makes units of a plan, while other machines make others
    finishing  publishes what several machines have made
"""

"""Making an output.

Each module imports only modules above it::

    process    memory of this process, the garbage collector
    workspace  a worker's buffers, and the numbers of its inputs
    executors  what runs tasks
    choosing   which executor runs a plan
    worker     units of a merge, from inputs to written bytes
    engine     all tensors of a run, given to workers
    reading    files that workers read through
    spooling   inputs that cannot be mapped are copied out first
    relatives  whether inputs come from one training
    readback   whether an output can be read back
    session    one output in the making
    execution  a plan, run to its end
"""

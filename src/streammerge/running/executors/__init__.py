"""What runs work, and knows nothing about it.

Each module imports only modules above it::

    base      the protocol of works, workers and executors
    registry  from a name to an executor
    messages  how a process and its workers talk
    server    the clean process from which workers are forked
    threads   workers are threads of this process
    processes workers are processes
"""

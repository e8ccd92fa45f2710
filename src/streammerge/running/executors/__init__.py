"""Executors: they run work, and know nothing about its meaning.

Each module imports only modules above it::

    base      the protocol of works, workers and executors
    registry  from a name to an executor
    messages  messages between a process and its workers
    server    the clean process from which workers are forked
    importing whether a clean process can load what it is sent
    threads   workers are threads of this process
    processes workers are processes
    ray       the nodes of a Ray cluster
"""

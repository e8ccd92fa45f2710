"""What runs tasks, and knows nothing about them.

Each module imports only modules above it::

    base      the protocol
    registry  from a name to an executor
    threads
"""

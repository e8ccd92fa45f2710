"""Whether an output is what its receipt says.

Each module imports only modules above it::

    files   structure and checksums
    values  a sample of its values, computed again
"""

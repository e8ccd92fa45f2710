"""Checks whether an output agrees with its receipt.

Each module imports only modules above it::

    files   structure and checksums
    values  a sample of the values, computed again
"""

"""Adapters that are made: differences of models, and combinations of adapters, as products of two factors.

Each module imports only modules above it::

    truncated    the truncated singular value decomposition of a matrix that is read by rows
    layers       what is made for each module of an adapter, and what came out
    documents    PEFT's configuration, and the names in its file
    making       makes an adapter: workers, temporary files, the output
    extraction   an adapter from the difference of two models
    combination  an adapter from adapters
"""

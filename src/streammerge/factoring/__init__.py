"""Adapters that are made: differences of models, and combinations of adapters, as products of two factors.

Each module imports only modules above it::

    truncated    the truncated singular value decomposition of a matrix that is read by rows
    layers       what is made for each module of an adapter, and what came out
    documents    PEFT's configuration, and the names in its file
    recording    the recipe and the receipt of an adapter, and what identifies its run
    making       makes an adapter: workers, temporary files, the output
    planned      the plan of an adapter, which prints itself
    extraction   an adapter from the difference of two models
    parameters   the parameters of a method for each tensor of a merge of adapters
    combination  an adapter from adapters
"""

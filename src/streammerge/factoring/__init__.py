"""Adapters that are made: differences of models, and combinations of adapters, as products of two factors.

Each module imports only modules above it::

    truncated    the truncated singular value decomposition of a matrix that is read by rows
    layers       what is made for each module of an adapter, and what came out
    computing    computes the factors of one layer, as they are stored
    documents    PEFT's configuration, and the names in its file
    naming       which modules of several adapters are the same, whatever their dialect calls them
    single       an adapter as one file: its dialect and its metadata
    recording    the recipe and the receipt of an adapter, and what identifies its run
    writing      writes the tensors of an adapter: into a folder, or into one file
    making       makes an adapter: workers, temporary files, the output
    planned      the plan of an adapter, which prints itself
    extraction   an adapter from the difference of two models
    parameters   the parameters of a method for each tensor of a merge of adapters
    combination  an adapter from adapters
"""

"""The output before it exists: its files, and where each tensor goes.

Each module imports only modules above it::

    layout       what every kind of output is planned as
    bookkeeping  step, epoch and loss of a merge
    pickled      a .pth
    container    which container it is; a file or folder of safetensors
"""

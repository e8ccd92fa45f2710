"""Decides what becomes of each thing in an input: merged, copied, edited or dropped, and why.

Each module imports only modules above it::

    ledger   the decisions: a plan prints them, a receipt records them
    pruned   entries beside the one state dict that an output keeps
    entries  what becomes of each entry of a pickle
    files    what becomes of each file of a folder
"""

"""The options of all functions and commands, each described once: name, type, default, choices, description.

The command line makes its options from these classes. The Python functions make their documentation and checks from them,
and the recipe the keys that an option overrides. The functions repeat names, types and defaults in their signatures, which
editors read. A test checks that both agree.

A description names another option in backquotes and in Python's syntax: ```on_missing="base"```. The command line shows it
as ``--on-missing base``.

Each module imports only modules above it::

    base        what an option is, and a class of options
    values      the kinds of values that options take
    selecting   which tensors of a file are the weights
    merging     what is merged, and how
    sweeping    many merges of the same inputs
    converting  what a conversion changes, what an adapter holds
    writing     what is written, and over what
    resources   memory, workers, machines
    telling     what is checked, compared and shown
    functions   which classes each function takes
"""

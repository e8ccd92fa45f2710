"""One file per command: its options and its call. The command has the name of its module.

No module here imports another. A command imports its code when it runs, so that ``--help`` is fast.
"""

"""One file per command: its options and its call. The command has the name of its module.

No module here imports another. What a command needs is imported when it runs, so that ``--help`` waits for nothing.
"""

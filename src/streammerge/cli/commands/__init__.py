"""One file per command: its options and its call. The command has the name of its module.

No module here imports another. A command is imported when it is used, and imports its code when it runs, so that ``--help``
is fast.
"""

SHORT = {
    "clean": "Discard what an interrupted run has left.",
    "convert": "Convert .pth to safetensors or back; recast, shrink, shard.",
    "diff": "Compare two checkpoints: what moved, and how far.",
    "extract": "Write the difference of a model and its base as a LoRA adapter.",
    "finish": "Check that all units of a saved plan are made, and make the output visible.",
    "help": "Show the help of streammerge, or of one command.",
    "inspect": "Show what a checkpoint is and holds; nothing in it is executed.",
    "merge": "Merge checkpoints into one.",
    "methods": "List the merge methods, or show one: parameters, formula, paper.",
    "plan": "Show what merge would do; nothing else is written.",
    "report": "Show a merge as a page with pictures, which a browser opens offline.",
    "runs": "List outputs in a folder whose runs go on or were interrupted.",
    "sweep": "Make many merges of the same inputs in one read, score them, keep the best.",
    "verify": "Check that an output is what its recipe says.",
    "worker": "Make a part of a merge on this machine.",
}
"""The first sentence of each command's help once more, so that ``--help`` imports none of them."""

"""Plans the output: its files, and the place of each tensor.

Each module imports only modules above it::

    layout       the plan of any kind of output
    bookkeeping  step, epoch and loss of a merge
    tree_builder where the tensors of a pickle get their bytes
    tree_edits   what is edited in the tree of the first input
    pickled      a .pth
    distributed  a folder of torch.distributed.checkpoint
    templates    the built-in chat templates
    tokenizer    tokenizer files and chat template of a folder
    config       the edited config.json of a folder
    card         the model card of a folder
    folder       a folder: shards, index, side files
    container    the choice of the container; a file of safetensors
"""

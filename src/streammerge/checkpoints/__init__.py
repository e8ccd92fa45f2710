"""One model, found and described from its headers.

Each module imports only modules above it::

    numbers      what a name says: step, epoch, metrics
    globs        paths and globs, in the order of their numbers
    duplicates   paths that are one checkpoint
    metrics      numbers beside a checkpoint
    index        CheckpointIndex
    agreement    the same copy of the weights in every input
    profiles     programs whose loaders ignore some tensors
    in_memory    state dicts that the caller holds
    config_text  edits of a JSON text in place
    config_keys  what programs agree on about the keys of a configuration: data
    config       the configuration beside a model's weights
    config_layers  a configuration follows layers that were moved
    config_edits  its dtype, rows of embeddings, tied head
    config_differences  what configurations disagree on
    config_tokens  its numbers of tokens
    tokens       the number of each token
    vocabularies  the tokens of tokenizers beside the weights
    heads        heads that are tied to the embeddings
    steps        the checkpoints of a run, by its folder
    choosing     the last, a range, the best
    schedules    weights of a run's last checkpoints
    conversions  inputs converted to safetensors first
"""

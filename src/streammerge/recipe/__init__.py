"""The user's request as frozen data: recipes, their keys, their checks, and their text.

Each module imports only modules above it::

    fields     kinds of values that a key may hold
    patterns   globs and regular expressions on tensor names
    settings   parameters with filters and gradients
    names      what a name tells by itself
    stage_names a stage as a model, as text
    adapted    a model with adapters on it, as text
    scalars    single values: paths, sizes, dtypes, methods
    vocabulary whose tokens the output has, and where their rows come from
    experts    the experts of a mixture of experts
    extraction which part of a difference an adapter holds
    model      the classes, whose fields are the keys
    document   YAML text with the place of each key
    stages     merges that are models of other merges: found in the text, checked, in their order
    checks     mistakes in a recipe
    hub_names  names that are repositories of the hub
    locations  paths of its models, and their names in a recipe that travels with an output
    reader     a file or plain data -> a Recipe
    arguments  the arguments of merge() -> a Recipe
    varying    a recipe with other parameters, for sweeps
    summary    a recipe as readable text
"""

"""What the user asked for, as frozen data.

Each module imports only modules above it::

    fields     what a key of a recipe may hold
    patterns   globs and regular expressions on tensor names
    settings   parameters with filters and gradients
    scalars    single values: paths, sizes, dtypes, methods
    model      the classes, whose fields are the keys
    document   YAML text with the place of each key
    checks     what is wrong with a recipe
    locations  where its models are, and what to call them in one that travels
    reader     from a file or plain data to a Recipe
    arguments  from the arguments of merge() to a Recipe
    summary    a recipe as a person reads it
"""

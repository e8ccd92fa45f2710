"""What a public function was asked for: from its arguments to a plan. Opens checkpoints; merges nothing.

Each module imports only modules above it::

    inputs       paths, state dicts in memory, weights behind them
    adapters     adapters among the inputs: each on its base, or all merged to an adapter
    extractions  the arguments of an extraction, and its recipe
    plans        from a recipe to a plan
    merging      the arguments of a merge or a plan
    conversions  the conversions that a merge makes first
    machines     saved plans, and what a machine does of them
    cluster      a merge on the nodes of a Ray cluster
"""

"""The merge methods: one file per family, found through :mod:`streammerge.methods.registry`."""

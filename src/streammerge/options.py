"""Words that options and recipe keys take, and what an output calls its recipe. They stand apart, so that --help waits for
nothing else."""

from __future__ import annotations

EMA_CHOICES = ("ignore", "prefer", "only")
ON_MISSING = ("error", "base", "average-present", "drop", "union")
ON_SHAPE = ("error", "base", "rows")
INTEGERS = ("first", "last", "max", "error")
IO = ("mmap", "pread")
DEFAULT_MEMORY = "512MiB"

RECIPE_FILE, RECEIPT_FILE = "streammerge.yaml", "streammerge.json"
RECIPE_KEY, RECEIPT_KEY = "streammerge", "streammerge_receipt"
"""What the recipe and the receipt of an output are called, as files, as records of an archive, and in metadata."""

"""Words that options and recipe keys take. They stand apart, so that --help waits for nothing else."""

from __future__ import annotations

EMA_CHOICES = ("ignore", "prefer", "only")
ON_MISSING = ("error", "base", "average-present", "drop")
ON_SHAPE = ("error", "base", "rows")
INTEGERS = ("first", "last", "max", "error")
IO = ("mmap", "pread")
DEFAULT_MEMORY = "512MiB"

"""The names under which an output holds its recipe and its receipt."""

from __future__ import annotations

RECIPE_FILE, RECEIPT_FILE = "streammerge.yaml", "streammerge.json"
"""As files of a folder, and as records of an archive."""
RECIPE_KEY, RECEIPT_KEY = "streammerge", "streammerge_receipt"
"""As keys of metadata."""

"""The names under which an output holds its recipe, its receipt and its model card."""

from __future__ import annotations

RECIPE_FILE, RECEIPT_FILE = "streammerge.yaml", "streammerge.json"
"""As files of a folder, and as records of an archive."""
CARD_FILE = "README.md"
"""The model card of a folder, which has the recipe for people."""
RECIPE_KEY, RECEIPT_KEY = "streammerge", "streammerge_receipt"
"""As keys of metadata."""

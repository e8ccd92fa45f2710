"""Benchmarks of streammerge's time and memory, against the disk itself and against other tools. See README.md here."""

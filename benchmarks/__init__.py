"""What streammerge costs, in time and memory, beside the disk itself and beside other tools. See README.md here."""

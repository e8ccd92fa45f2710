"""Every system call on checkpoint files: reading and mapping, writing and syncing, what has been done, committing."""

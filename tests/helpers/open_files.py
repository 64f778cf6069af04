"""How many files a process has open, for tests of what must not grow."""

from pathlib import Path


def open_files() -> int:
    """File descriptors of this process, pipes and sockets too; 0 where the system does not list them."""
    folder = Path("/proc/self/fd")
    return sum(1 for _ in folder.iterdir()) if folder.is_dir() else 0

"""Ask glibc to keep freed memory: page faults cost more CPU time in a training step than Lightning does."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Raise both of glibc's thresholds, where it is the C library (one alone makes steps slower); numbers stay."""
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    if mallopt(M_MMAP_THRESHOLD, 1 << 30):
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)

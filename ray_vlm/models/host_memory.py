"""Give memory of the host back while a base is read: freed weights in 16 bit, and pages of files that were read.

glibc keeps what is freed below blocks that are still in use, and a weight in 4 bit often lies behind the one that it
was made of. safetensors maps its files, and mapped pages count as the process's until the kernel needs them elsewhere.
"""

import ctypes
import re
import sys
from collections.abc import Iterable

_MADV_DONTNEED = 4  # from Linux's mman-common.h
_LEAST = 2**20  # bytes of a mapping that is worth a system call
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ +(/.*)$")


def release_read() -> None:
    """Give back freed memory, and unmap pages of mapped files, which are read again if they are wanted.

    Does nothing on systems other than Linux with glibc."""
    if sys.platform != "linux":
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.malloc_trim(0)
        with open("/proc/self/smaps", encoding="utf-8", errors="replace") as file:
            ranges = clean_ranges(file)
        for start, end in ranges:
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
    except (OSError, AttributeError):  # another C library, or no /proc
        return


def clean_ranges(smaps: Iterable[str]) -> list[tuple[int, int]]:
    """Return the first and last address of every mapping of a file of which no page was written to, so that no change
    is lost with its pages. Programs are left out. `smaps`: lines of Linux's file of that name."""
    ranges, current = [], None
    for line in smaps:
        if match := _MAPPING.match(line):
            start, end = int(match[1], 16), int(match[2], 16)
            wanted = match[3].startswith("r") and match[3][2:] == "-p" and end - start >= _LEAST
            current = (start, end) if wanted and not match[4].endswith((".so", " (deleted)")) else None
        elif "-" in line.split(" ", 1)[0]:  # memory without a file
            current = None
        elif current is not None and line.startswith("Anonymous:"):
            if line.split()[1] == "0":
                ranges.append(current)
            current = None
    return ranges

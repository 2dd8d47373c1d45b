"""How the library is made of the C beside this file; setup.py reads this without torch and without the package."""

import zlib
from pathlib import Path

HERE = Path(__file__).parent
SOURCES = tuple(HERE / name for name in ("calls.c", "passes.c", "statistics.c"))
# No -ffast-math: what is not a number must stay so. -fno-math-errno and -fno-trapping-math change no result
FLAGS = ("-std=gnu11", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-Wno-psabi")


def fingerprint() -> int:
    """Of the C that is here now: a library that was made of other C takes other records."""
    files = sorted([*HERE.glob("*.c"), *HERE.glob("*.h")])
    return zlib.crc32(b"".join(file.read_bytes() for file in files)) if files else 0


def defines() -> tuple[tuple[str, str], ...]:
    return (("FINGERPRINT", f"{fingerprint()}u"),)

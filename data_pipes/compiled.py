"""Loops that numba compiles to machine code, once per machine where a cache can be written.

Importing numba takes half a second: modules of such loops are imported where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit

__all__ = ["compiled"]

Function = TypeVar("Function", bound=Callable)


def compiled(function: Function) -> Function:
    """One thread, IEEE arithmetic in the order that is written, the interpreter lock let go.

    Compiled code is kept beside the source, else in the user's cache or $NUMBA_CACHE_DIR; where none of them can be
    written it is compiled again in each process.
    """
    compiler: Any = njit  # what it returns is called as the function is
    try:
        return compiler(cache=True, nogil=True)(function)
    except RuntimeError:  # numba finds no folder that can be written
        return compiler(nogil=True)(function)

"""How the inner loops of data_pipes are compiled. Import it, and what uses it, only where a loop is about to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from numba import types

__all__ = ["array", "compiled", "inlined"]


def compiled(signature: Any = None) -> Callable[[Callable[..., Any]], Any]:
    """Decorates a loop for numba: one thread, plain IEEE arithmetic (no fused or reordered operations).

    With a signature it is compiled on import, for that alone; else when it is called. The result is kept beside the
    source, in the user's cache or in $NUMBA_CACHE_DIR, and in memory alone where none of them can be written. What is
    kept is renewed when its own file changes and no other: compiled functions call only functions of their own file.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            return numba.njit(signature, cache=True, nogil=True, error_model="numpy")(function)
        except (RuntimeError, OSError):  # no place to keep it, or one that is full
            return numba.njit(signature, nogil=True, error_model="numpy")(function)

    return decorate


def inlined(function: Callable[..., Any]) -> Any:
    """Decorates a part of such loops: it becomes part of each, as arrays are counted anew in every call proper."""
    return numba.njit(nogil=True, error_model="numpy", forceinline=True)(function)


def array(dtype: Any, ndim: int, *, written: bool = False) -> types.Array:
    """The type of a C-contiguous argument; one that is only read may come from a read-only buffer."""
    return types.Array(dtype, ndim, "C", readonly=not written)

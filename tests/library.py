"""The kernels' C++ library, without which no run of the tests goes on, unless the run wants none.

`COLM_KERNELS_VARIANT=torch` wants none: on a machine without a compiler, and in `make test-variants`. Only then are
tests of the library itself skipped.
"""

import pytest
from colm_kernels import native

_WANTS_NONE = native.FORCED_VARIANT == "torch"

needs_library = pytest.mark.skipif(_WANTS_NONE, reason="COLM_KERNELS_VARIANT=torch wants no library")

VARIANTS: tuple[native.Variant, ...] = tuple(name for name in native.available_variants() if name != "torch")
"""Those of the library that can run here, as parameters of tests that `needs_library`."""


def why_no_library() -> str | None:
    """What is missing, and what to run; None where the library is there, or nobody wants it."""
    if VARIANTS or _WANTS_NONE:
        return None
    return (
        "the kernels' C++ library is not built, was built from other sources, or cannot run on this CPU: run "
        "`python kernels/build.py`, or set COLM_KERNELS_VARIANT=torch to test what PyTorch does without it"
    )

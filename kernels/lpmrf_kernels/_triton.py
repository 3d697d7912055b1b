"""The only import of triton: `triton`, `tl`, `jit`, and why they are missing where they are.

Without triton every module still imports: kernels stay plain Python functions that nobody calls, because the
registry refuses the backend with `MISSING` as the reason.
"""

import os

MISSING: str | None = None

try:
    import triton
    import triton.language as tl

    jit = triton.jit
    # Read once, as triton does: its own library functions are decorated at import and stay what they became.
    INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
except ImportError as error:
    MISSING = f"triton cannot be imported ({error})"
    INTERPRETED = False
    triton = None

    class tl:  # what a kernel's signature needs while it is defined; its body is never run
        constexpr = None

    def jit(kernel):
        return kernel

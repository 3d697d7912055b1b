"""Builds the C++ kernels in csrc/ where torch and a compiler are there; the metadata is in pyproject.toml.

The kernels are optional: without them the ops run in PyTorch, and `lpmrf_kernels.backends()` says why. So nothing here
may stop an install; what was skipped is printed (pip shows it with -v).
"""

from pathlib import Path

from setuptools import setup


def cpp_kernels() -> dict:
    """setup()'s arguments for lpmrf_kernels/_C.abi3.so; none, with the reason printed, where it cannot be built."""
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension, CppExtension

        if tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10):
            raise RuntimeError(f"torch {torch.__version__} has no stable ABI for them; 2.10 does")
    except Exception as error:  # no torch, or a broken one: neither may stop the install
        return skipped(error)

    class BuildOrSkip(BuildExtension):
        def run(self):
            try:
                super().run()
            except (Exception, SystemExit) as error:  # nor may a compiler
                self.extensions.clear()  # or an editable install looks for the file that was not built
                skipped(error)

    extension = CppExtension(
        "lpmrf_kernels._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        py_limited_api=True,
        extra_compile_args=[
            "-O3",
            "-g0",
            "-std=c++17",
            "-ffp-contract=off",  # the same bits on every instruction set
            "-fno-math-errno",  # or sqrt is a call and its loop stays scalar
            "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of torch 2.10: loads into later ones too
        ],
    )
    return {
        "ext_modules": [extension],
        "cmdclass": {"build_ext": BuildOrSkip.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def skipped(error: BaseException) -> dict:
    print(f"The C++ kernels are left out: {type(error).__name__}: {error}")
    return {}


setup(**cpp_kernels())

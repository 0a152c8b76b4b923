"""The compiled kernels; pyproject.toml has the rest. Where they cannot be built, crushkv is installed without them."""

import platform

from setuptools import Extension, setup

FLAGS = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-ffp-contract=fast",
    "-pthread",
]
BUILDS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    BUILDS["avx2"] = ["-mavx2", "-mfma"]
    BUILDS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]

setup(
    ext_modules=[
        Extension(
            f"crushkv.kernels._cpu_{name}",
            ["src/crushkv/kernels/cpu.cpp"],
            extra_compile_args=[*FLAGS, "-Wno-psabi", *flags],
            optional=True,
        )
        for name, flags in BUILDS.items()
    ]
)

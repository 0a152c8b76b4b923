"""The compiled code; pyproject.toml has the rest. Where they cannot be built, crushkv is installed without them."""

import platform
from glob import glob

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
FOLDER = "src/crushkv/compiled"
BUILDS = {"portable": []}
if platform.machine().lower() in ("x86_64", "amd64"):
    BUILDS["avx2"] = ["-mavx2", "-mfma"]
    BUILDS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"]

setup(
    ext_modules=[
        Extension(
            f"crushkv.compiled._cpu_{name}",
            [f"{FOLDER}/{file}.cpp" for file in ("cpu", "cpu_attention", "cpu_basis", "cpu_quantize")],
            depends=glob(f"{FOLDER}/*.h"),
            extra_compile_args=[*FLAGS, "-Wno-psabi", *flags],
            optional=True,
        )
        for name, flags in BUILDS.items()
    ]
)

"""The extension alone; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

sources = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
flags = ["-O1", "-g0", "-DAT_PER_OPERATOR_HEADERS", "-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO"]
setup(
    ext_modules=[
        CppExtension("toyhw._C", sources, include_dirs=[str(Path("csrc").resolve())], extra_compile_args=flags)
    ],
    cmdclass={"build_ext": BuildExtension},
)

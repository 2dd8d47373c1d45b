"""The library of native CPU kernels, which an installation does without where nothing compiles it."""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOM = Path("syncbn/kernels/cpu")
build = runpy.run_path(str(ROOM / "build.py"))


class BuildLibrary(build_ext):
    """A library for ctypes: it knows nothing of Python, so neither its name nor its symbols are a module's."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


library = Extension(
    "syncbn.kernels.cpu.compiled",
    sources=[str(ROOM / source.name) for source in build["SOURCES"]],
    depends=[str(path) for path in sorted(ROOM.glob("*.h"))],
    define_macros=list(build["defines"]()),
    extra_compile_args=list(build["FLAGS"]),
    optional=True,
)

setup(ext_modules=[library], cmdclass={"build_ext": BuildLibrary})

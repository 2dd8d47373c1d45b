"""What pyproject.toml cannot say: libraries of C, which an installation does without where nothing compiles them."""

import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU, MEMORY = Path("syncbn/kernels/cpu"), Path("syncbn/shared_memory")
build = runpy.run_path(str(CPU / "build.py"))


class BuildLibrary(build_ext):
    """A library for ctypes: it knows nothing of Python, so neither its name nor its symbols are a module's."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


kernels = Extension(
    "syncbn.kernels.cpu.compiled",
    sources=[str(CPU / source.name) for source in build["SOURCES"]],
    depends=[str(path) for path in sorted(CPU.glob("*.h"))],
    define_macros=list(build["defines"]()),
    extra_compile_args=list(build["FLAGS"]),
    optional=True,
)
mailbox = Extension(
    "syncbn.shared_memory.compiled",
    sources=[str(MEMORY / "mailbox.c")],
    extra_compile_args=["-std=gnu11", "-O3"],
    optional=True,
)

setup(ext_modules=[kernels, mailbox], cmdclass={"build_ext": BuildLibrary})

"""What pyproject.toml cannot say: C that is built where there is a compiler, and done without where there is none."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "syncbn.shared_memory._mailbox",
            ["syncbn/shared_memory/mailbox.c"],
            extra_compile_args=["-std=gnu11", "-O3"],
            optional=True,
        )
    ]
)

"""For tools that look for this file. The metadata of the package is in pyproject.toml."""

from setuptools import setup


# the name of this file, which is not a module of the package although it is in its folder
setup(script_name="setup.py")

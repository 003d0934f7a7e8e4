"""For tools that look for this file. The metadata of the package is in pyproject.toml."""

from setuptools import setup


setup()

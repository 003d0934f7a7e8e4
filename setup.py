"""For tools that look for this file, and the long description. The other metadata of the package is in pyproject.toml."""

import runpy
from pathlib import Path

from setuptools import setup


tool = Path(__file__).parent / "tools" / "long_description.py"
# the name of this file, which is not a module of the package although it is in its folder
setup(
    script_name="setup.py",
    long_description=runpy.run_path(str(tool))["long_description"]() if tool.exists() else "",
    long_description_content_type="text/markdown",
)

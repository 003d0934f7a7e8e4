"""For tools that look for this file, and the long description. The other metadata of the package is in pyproject.toml."""

import os
import runpy

from setuptools import setup


text = runpy.run_path("tools/long_description.py")["long_description"]() if os.path.exists("tools") else ""
setup(script_name="setup.py", long_description=text, long_description_content_type="text/markdown")

"""Tools for the development of the project. They are not needed to use the package."""

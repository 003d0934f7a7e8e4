"""The web page of examples/app.py: the layout, the generation, and the Python script of each generation."""

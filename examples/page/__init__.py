"""The web page of examples/app.py: the layout, the drawing, and the Python script of each drawing."""

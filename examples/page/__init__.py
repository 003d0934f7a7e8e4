"""The web page of examples/app.py: what it shows, what it draws, and the Python that it writes."""

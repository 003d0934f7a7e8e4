"""A web page to draw subjects with: upload a picture, name or paint the subject, and draw it anew.

    python examples/app.py

Without options it serves the pocket checkpoint, on this machine alone.
"""

from page.server import main


if __name__ == "__main__":
    main(description=__doc__)

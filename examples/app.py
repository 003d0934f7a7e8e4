"""A web page to draw subjects with: upload a picture, name or paint the subject, and draw it anew."""

from page.server import main


if __name__ == "__main__":
    main(description=__doc__)

"""A web page for SSR-Encoder: upload a picture, name or paint the subject, and draw new pictures of it.

With the pocket checkpoint, or with any other checkpoint and its SSR-Encoder:

    python examples/app.py
    python examples/app.py --checkpoint stable-diffusion-v1-5/stable-diffusion-v1-5 --ssr <owner>/<repo> --scale 0.65
"""

import extras  # noqa: F401  (says so if the project is not installed)

from page.server import main


if __name__ == "__main__":
    main(description=__doc__)

"""Web page: upload a reference image, name the subject or paint over it, and generate new images of it.

The page uses the pocket checkpoint, or another checkpoint with its SSR-Encoder:

    python examples/app.py
    python examples/app.py --checkpoint stable-diffusion-v1-5/stable-diffusion-v1-5 --ssr <owner>/<repo>
"""

import extras  # noqa: F401  (exits with a message if the project is not installed)

from command_line import run_script
from page.server import main


if __name__ == "__main__":
    run_script(lambda: main(description=__doc__))

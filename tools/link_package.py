"""Make `diffusers_ssr` importable from the repository in this Python environment, without pip. pip would also install the
required versions of other packages, and the tests with other versions check these requirements."""

import sysconfig
from pathlib import Path


def main() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    folder = packages / "diffusers_ssr_link"
    folder.mkdir(exist_ok=True)
    link = folder / "diffusers_ssr"
    link.unlink(missing_ok=True)
    link.symlink_to(Path(__file__).resolve().parent.parent, target_is_directory=True)
    (packages / "diffusers_ssr_link.pth").write_text(f"{folder}\n")


if __name__ == "__main__":
    main()

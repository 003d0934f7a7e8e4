"""For tools that look for this file, and the long description. The other metadata of the package is in pyproject.toml."""

import os
import runpy

from setuptools import setup


<<<<<<< HEAD
HERE = Path(__file__).parent


def long_description() -> str:
    """Returns the README without its front matter, and with links to the repository that this folder was cloned from.
    Without such a repository, images are left out, and links are only text."""
    text = re.sub(r"\A---\n.*?\n---\n+", "", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    failed, url = subprocess.getstatusoutput(f'git -C "{HERE}" remote get-url origin')
    url = re.sub(r"^git@([^:]+):", r"https://\1/", url.strip()).removesuffix(".git")
    if failed or not url.startswith("https://") or "@" in url:
        text = re.sub(r"!\[[^\]]*\]\((?!https:)[^)]*\)\n*", "", text)
        return re.sub(r"\[([^\]]*)\]\((?!https:)[^)]*\)", r"\1", text)
    files, pages = ("resolve/main", "blob/main") if "huggingface.co" in url else ("raw/HEAD", "blob/HEAD")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https:)", rf"\1{url}/{files}/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https:)", rf"\1{url}/{pages}/", text)


# the name of this file, which is not a module of the package although it is in its folder
setup(
    script_name="setup.py",
    long_description=long_description(),
    long_description_content_type="text/markdown",
)
=======
text = runpy.run_path("tools/long_description.py")["long_description"]() if os.path.exists("tools") else ""
setup(script_name="setup.py", long_description=text, long_description_content_type="text/markdown")
>>>>>>> first

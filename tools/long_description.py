"""The long description of the package, which setup.py runs."""

import re
import subprocess
from pathlib import Path


HERE = Path(__file__).resolve().parent.parent


def long_description() -> str:
    """Returns the README without its front matter, which is for the Hub, and with links to the repository that this folder
    was cloned from. Without such a repository, images are left out, and links are only text."""
    text = re.sub(r"\A---\n.*?\n---\n+", "", (HERE / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    command = ["git", "-C", str(HERE), "remote", "get-url", "origin"]
    try:
        url = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        url = ""
    url = re.sub(r"^git@([^:]+):", r"https://\1/", url).removesuffix(".git")
    if not url.startswith("https://") or "@" in url:
        text = re.sub(r"!\[[^\]]*\]\((?!https:)[^)]*\)\n*", "", text)
        return re.sub(r"\[([^\]]*)\]\((?!https:)[^)]*\)", r"\1", text)
    files, pages = ("resolve/main", "blob/main") if "huggingface.co" in url else ("raw/HEAD", "blob/HEAD")
    text = re.sub(r"(!\[[^\]]*\]\()(?!https:)", rf"\1{url}/{files}/", text)
    return re.sub(r"((?<!!)\[[^\]]*\]\()(?!https:)", rf"\1{url}/{pages}/", text)

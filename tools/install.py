"""Run `pip install` and show its progress in one line.

python tools/install.py -e ".[demo]"
"""

import re
import subprocess
import sys
import time


def status(line: str) -> str | None:
    """What a line of pip's output tells about its progress, or `None` for the lines that tell nothing."""
    for pattern, text in (
        (r"Collecting (\S+)", "finding {}"),
        (r"Downloading (\S+-\S+ \([\d.]+ [kMG]?B\))", "downloading {}"),
        (r"Installing collected packages: (.+)", "installing {count} packages"),
        (r"Building wheels? for .*: (.+)", "building {}"),
    ):
        found = re.match(pattern, line.strip())
        if found:
            return text.format(found[1], count=found[1].count(",") + 1)
    return None


def main() -> int:
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", *sys.argv[1:]]
    started = time.monotonic()
    on_terminal = sys.stderr.isatty()
    output = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as pip:
        for line in pip.stdout:
            output.append(line)
            shown = status(line)
            if shown is None or not (on_terminal or shown.startswith("installing") or "MB" in shown):
                continue
            text = f"{time.monotonic() - started:4.0f} s  {shown}"
            # on a terminal each line takes the place of the one before
            print(
                f"\r\x1b[K{text[:100]}" if on_terminal else text,
                end="" if on_terminal else "\n",
                file=sys.stderr,
                flush=True,
            )
    if on_terminal:
        print(file=sys.stderr)
    if pip.returncode:
        print("".join(output[-30:]), file=sys.stderr)
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main())

"""Open pages in headless Chromium: a picture of each, and a failure where one logs an error or asks for anything.

python benchmarks/look.py FOLDER PAGE.html ...
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

OWN = r"google|gstatic|chromium|gvt1"  # hosts that Chromium itself asks for updates and dictionaries


def look(page: Path, picture: Path, size: str = "1280,2600") -> list[str]:
    """Write a picture of a page; return what its console said and what it asked the network for."""
    with tempfile.TemporaryDirectory() as home:
        log = Path(home) / "net.json"
        command = [
            "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            f"--user-data-dir={home}/user",
            "--enable-logging=stderr", "--v=0", f"--log-net-log={log}", f"--window-size={size}",
            "--disable-background-networking", "--disable-component-update", "--no-first-run",
            f"--screenshot={picture}", page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        net = log.read_text(encoding="utf8") if log.is_file() else ""
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    asked = sorted(set(re.findall(r'"url":"((?:https?|wss?)://[^"]+)"', net)))
    asked = [url for url in asked if not re.search(OWN, url)]
    return said + asked if picture.is_file() else ["no picture was made", *done.stderr.splitlines()[-3:]]


def main() -> int:
    folder, pages = Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]
    folder.mkdir(parents=True, exist_ok=True)
    wrong = 0
    for page in pages:
        name = f"{page.parent.name}-{page.stem}.png"
        found = look(page, (folder / name).resolve())
        print(page, found or "clean")
        wrong += bool(found)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

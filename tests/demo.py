"""Show the two scripts at work without a download: paint, train, test, in about a minute.

    python tests/demo.py [folder]        the folder is demo/ by default

Paints five styles of 60 paintings and puts six of them into a wrong folder. Then it trains a small
and quick model on them from scratch and tests it, with train_model.py and test_model.py as they
are, and tells how many of the six stand among those that look mislabelled. Run again, it resumes.
"""

import contextlib
import csv
import subprocess
import sys
from pathlib import Path

from paintings import ARTISTS, paint_artgan

ROOT = Path(__file__).resolve().parent.parent


def run(command):
    """Run a command to its own end, after Ctrl-C too, of which it says a line; return its code."""
    with subprocess.Popen(command) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


def mislabel(originals, painted, number=6):
    """Move some of {"Style/name.jpg": style}, each of its style's main artist, to another style."""
    styles = sorted(set(painted.values()))
    typical = [path for path in sorted(painted)
               if f"/{ARTISTS[styles.index(painted[path])]}_" in path]
    for path in typical[:: len(typical) // number][:number]:
        style, _, name = path.partition("/")
        other = styles[(styles.index(style) + 2) % len(styles)]
        (originals / path).rename(originals / other / name.replace("study", "mislabelled-study"))


def main():
    """Run the demo; return the exit code."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    originals = folder / "wikiart"
    if not originals.exists():
        print(f"painting 300 pictures into {originals}, 6 of them in a wrong folder", flush=True)
        mislabel(originals, paint_artgan(originals))
    folders = ["--data-dir", originals, "--cache-dir", folder / "wikiart_cache",
               "--output-dir", folder]
    quick = ["--lists-dir", "none", "--weights", "none", "--image-size", "96",
             "--batch-size", "16", "--epochs", "6"]
    for command in (["train_model.py", *folders, *quick], ["test_model.py", *folders]):
        print("\n$ python", *command, flush=True)
        if code := run([sys.executable, ROOT / command[0], *command[1:]]):
            return code
    with open(folder / "outliers.csv", encoding="utf-8", newline="") as file:
        first = [row["path"] for row in csv.DictReader(file)][:12]
    found = sum("mislabelled" in path for path in first)
    print(f"\n{found} of the 6 mislabelled pictures are among the first 12 in outliers.csv\n"
          f"Look at {(folder / 'report.html').resolve()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

"""Show the two scripts at work without a download: paint, train, test, in about a minute.

    python tests/demo.py [folder]        the folder is demo/ by default

Paints five styles of 60 paintings, trains a small and quick model on them from scratch and tests
it, with train_model.py and test_model.py as they are. Run again, it resumes where it stopped.
"""

import contextlib
import subprocess
import sys
from pathlib import Path

from paintings import paint_artgan

ROOT = Path(__file__).resolve().parent.parent


def run(command):
    """Run a command to its own end, after Ctrl-C too, of which it says a line; return its code."""
    with subprocess.Popen(command) as process:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                return process.wait()


def main():
    """Run the demo; return the exit code."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "demo")
    originals = folder / "wikiart"
    if not originals.exists():
        print(f"painting 300 pictures into {originals}", flush=True)
        paint_artgan(originals)
    folders = ["--data-dir", originals, "--cache-dir", folder / "wikiart_cache",
               "--output-dir", folder]
    quick = ["--lists-dir", "none", "--weights", "none", "--image-size", "96",
             "--batch-size", "16", "--epochs", "6"]
    for command in (["train_model.py", *folders, *quick], ["test_model.py", *folders]):
        print("\n$ python", *command, flush=True)
        if code := run([sys.executable, ROOT / command[0], *command[1:]]):
            return code
    print(f"\nLook at {(folder / 'report.html').resolve()}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

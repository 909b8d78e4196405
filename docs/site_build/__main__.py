"""`python docs/site_build [build | serve] [flags of zensical]`: execute the notebooks, then build or serve the site.

`--no-notebooks` leaves out those that have not been executed: their pages show code without outputs.
"""

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main(arguments: list[str]) -> None:
    sys.path[:0] = [str(ROOT / "docs"), str(ROOT)]
    from zensical.main import cli

    from site_build import notebooks

    command, *flags = arguments or ["build"]
    if "--no-notebooks" in flags:
        flags.remove("--no-notebooks")
    else:
        notebooks.execute()
    # a page's cached form knows only its own Markdown, not the notebooks and files that it shows
    shutil.rmtree(ROOT / "docs" / ".cache", ignore_errors=True)
    cli.main([command, "--config-file", str(ROOT / "docs" / "zensical.toml"), *flags], prog_name="make docs")


if __name__ == "__main__":
    main(sys.argv[1:])

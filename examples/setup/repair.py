"""Drops the metadata of packages that an interrupted pip left half installed, so that pip installs them again.

pip takes a package for installed as soon as its `.dist-info` folder has METADATA. A killed pip leaves such a folder
without RECORD, with files that RECORD names and the disk has not (or has with another size), or with the wheel's own
RECORD, which pip completes last, after it wrote the package's commands. Standard library only: this runs inside an
environment that may hold nothing but pip.
"""

from __future__ import annotations

import csv
import shutil
import sys
import sysconfig
from pathlib import Path


def is_whole(dist_info: Path) -> bool:
    """True if pip completed RECORD, and every file that it names is on disk with the size that it gives.

    Bytecode is no evidence: other programs rewrite and remove it.
    """
    try:
        rows = list(csv.reader((dist_info / "RECORD").read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        return False
    if not any(path == f"{dist_info.name}/INSTALLER" for path, _, _ in rows):
        return False
    for path, _, size in rows:
        if path.endswith(".pyc"):
            continue
        file = dist_info.parent / path
        if not file.is_file() or (size and file.stat().st_size != int(size)):
            return False
    return True


def repair(site_packages: Path) -> list[str]:
    """Remove half-installed packages' metadata and pip's left-over `~name` folders; the names of what was removed."""
    dropped = [p for p in sorted(site_packages.glob("*.dist-info")) if not is_whole(p)]
    dropped += sorted(site_packages.glob("~*"))
    for path in dropped:
        shutil.rmtree(path)
    return [path.name for path in dropped]


if __name__ == "__main__":
    for name in repair(Path(sysconfig.get_path("purelib"))):
        print(f"setup:       half installed, will be installed again: {name}")
    sys.exit(0)

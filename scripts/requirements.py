"""Print what an installation with an extra needs, one requirement a line, ourselves left out.

``python scripts/requirements.py train``. The Dockerfile installs these before our code, so that a
change of the code does not download torch again, and no version stands in two places.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def requirements(extras: list[str]) -> list[str]:
    """The core's requirements and those of the extras. Raises KeyError for an unknown extra."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    found: list[str] = list(project["dependencies"])
    for extra in extras:
        for line in project["optional-dependencies"][extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", line)
            found += requirements(own[1].split(",")) if own else [line]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))

"""Print the section of CHANGELOG.md for a version: `release_notes.py VERSION`.

The release workflow passes a tag, so that `v0.1.0` stands for `0.1.0`.
"""

import re
import sys
from pathlib import Path

CHANGELOG = Path(__file__).parents[1] / "CHANGELOG.md"


def notes(changelog: str, version: str) -> str:
    """Return what a changelog says of a version, without the heading.

    Args:
      changelog: the text, in the format of Keep a Changelog. A heading is `## 0.1.0`, and
        may have brackets around the version and a date after it.
      version: as in the heading, or with a `v` before it.

    Returns:
      The text between the heading of the version and the next one.

    Raises:
      ValueError: there is no such heading, or nothing below it.
    """
    version = version.removeprefix("v")
    sections = re.split(r"^## +", changelog, flags=re.MULTILINE)[1:]
    found = {}
    for section in sections:
        heading, _, text = section.partition("\n")
        found[re.sub(r"[\[\]]", "", heading).split()[0]] = text.strip()
    if not found.get(version):
        msg = (
            f"The changelog says nothing of {version}; it has {', '.join(found)}. "
            f"Rename the section `Unreleased` to `{version} - DATE`."
        )
        raise ValueError(msg)
    return found[version]


if __name__ == "__main__":
    try:
        print(notes(CHANGELOG.read_text(), *sys.argv[1:]))
    except (TypeError, ValueError) as error:
        sys.exit(f"{error}\nUsage: release_notes.py VERSION")

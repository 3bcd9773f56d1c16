"""The manifest of the committed results: the SHA-256 of evaluations, records, tables, figures, verdicts and weights.

It lies beside them as `MANIFEST.sha256`, sorted by name, as `sha256sum` writes it, so that
`sha256sum --check MANIFEST.sha256` reads it too.
"""

import hashlib
from pathlib import Path

from kure_lib.files import read_sums, write_atomically

NAME = "MANIFEST.sha256"
CONTENTS = ("evaluations.*", "records/*.json", "tables/*.*", "figures/*.*", "verdicts/*.json", "weights/*.safetensors")


def sums(folder: Path) -> dict[str, str]:
    """The SHA-256 of the results in a profile's folder, by name; of weights those that are committed."""
    files = sorted(file for pattern in CONTENTS for file in folder.glob(pattern) if not file.name.startswith("."))
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def differences(folder: Path) -> list[str]:
    """What is new, changed or gone since the manifest was written: one line a file, sorted by name."""
    listed = read_sums(folder / NAME) if (folder / NAME).is_file() else {}
    found = sums(folder)
    states = dict.fromkeys(found, "new") | dict.fromkeys(listed, "gone")
    states |= dict.fromkeys(listed.keys() & found.keys(), "changed")
    return [f"{states[name]:8}{name}" for name in sorted(states) if listed.get(name) != found.get(name)]


def write(folder: Path) -> list[str]:
    """Write the manifest anew; returns how it differs from the one before (see `differences`)."""
    changed = differences(folder)
    write_atomically(folder / NAME, "".join(f"{digest}  {name}\n" for name, digest in sums(folder).items()))
    return changed

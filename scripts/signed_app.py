"""Apps that sites agree to: built once, signed by whom the sites trust, kept where the SuperLink finds them.

`python -m scripts.signed_app build FOLDER` packs this repository's code; the reviewer looks at the pack and signs it:
`python -m scripts.signed_app sign FOLDER NAME KEY`. NAME is that of the key in the sites' `--trusted-entities`, KEY an
Ed25519 key of `ssh-keygen`. Several may sign; a site needs one whom it trusts. What is built anew is unsigned again.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import get_fab_metadata
from flwr.supercore.primitives.asymmetric_ed25519 import create_message_to_sign, load_private_key, sign_message

ROOT = Path(__file__).resolve().parent.parent
SHELF = "http://127.0.0.1:9090"
"""Where the gate of the server serves the folder (docs/deployment/server-gate.conf)."""
PACK, SIGNED = "app.fab", "signed.json"


def main(arguments: Sequence[str]) -> int:
    """Build or sign; returns the exit status."""
    match [*arguments]:
        case ["build", folder]:
            print(name_of(build(Path(folder))))
        case ["build", folder, shelf]:
            print(name_of(build(Path(folder), shelf)))
        case ["sign", folder, name, key]:
            sign(Path(folder), name, Path(key))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


def build(folder: Path, shelf: str = SHELF, app: Path = ROOT) -> Path:
    """Pack an app, unsigned.

    Args:
        folder: for the pack and its signatures.
        shelf: the address at which the SuperLink finds the folder.
        app: the repository.

    Returns:
        The pack.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pack = folder / PACK
    pack.write_bytes(build_fab_from_disk(app))
    _write(folder, {"fab_url": f"{shelf}/{PACK}", "verifications": []})
    return pack


def name_of(pack: Path) -> str:
    """What `flwr run` calls a pack: @publisher/app==version."""
    app, version = get_fab_metadata(pack.read_bytes())
    return f"@{app}=={version}"


def sign(folder: Path, name: str, key: Path) -> None:
    """Add a signature to a pack.

    Args:
        folder: of the pack.
        name: of the key at the sites.
        key: private, Ed25519.
    """
    told = json.loads((folder / SIGNED).read_text(encoding="utf-8"))
    now = int(time.time())
    digest = hashlib.sha256((folder / PACK).read_bytes()).digest()
    signature = sign_message(load_private_key(key), create_message_to_sign(digest, now))
    others = [entry for entry in told["verifications"] if entry["public_key_id"] != name]
    text = base64.urlsafe_b64encode(signature).decode()
    told["verifications"] = [*others, {"public_key_id": name, "signature": text, "signed_at": now}]
    _write(folder, told)


def _write(folder: Path, told: dict[str, object]) -> None:
    (folder / SIGNED).write_text(json.dumps(told, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Plays docs/deployment.md on this machine: `python -m scripts.deployment_on_loopback FOLDER [SETTING=VALUE ...]`.

Three hospitals with images in folders of their own, a server, gates, TLS, keys, a signed app; then the same run in one
process over all images together. Ends with both tables, and fails unless they are the same, and all tensors, too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import torch

from fedseg.configs.compose import compose
from fedseg.datamodules.phantom.data import draw_case
from fedseg.datamodules.phantom.style import Dials
from fedseg.federation.checkpoint import Checkpoint
from fedseg.federation.contract import QueryTask
from fedseg.federation.flower.kept import Kept
from fedseg.federation.state import State
from fedseg.launch.run import execute
from fedseg.launch.settings import SCHEMA
from fedseg.reporting.folder import RunFolder
from scripts.loopback import Loopback

SITES = ("north", "south", "west")
SETTINGS = (
    "algorithm=ditto",
    "data=folder",
    "data.regions={disc: [1, 2], cup: [2]}",
    "data.size=32",
    "data.batch_size=2",
    "model=tiny",
    "federation.rounds=2",
    "federation.local_steps=2",
    "trainer.accelerator=cpu",
    "trainer.threads=1",
    "evaluation.overlays=false",
)


def main(arguments: Sequence[str]) -> int:
    """Play the guide; returns 0 if both tables and all tensors are the same."""
    folder, settings = Path(arguments[0]).absolute(), [*SETTINGS, *arguments[1:]]
    print("1. images: one folder for each hospital, and, for comparison, all of them together", flush=True)
    for number, site in enumerate(SITES):
        draw_site(folder / site / "data", site, number)
        (folder / "together").mkdir(exist_ok=True)
        (folder / "together" / site).symlink_to(folder / site / "data" / site)
    with Loopback(folder, gated=True) as loopback:
        play(loopback, settings)
    print("6. the same in one process", flush=True)
    here = [*settings, f"data.root={folder / 'together'}", f"output={folder / 'in-process'}"]
    execute(compose(here, SCHEMA))
    return compare(folder)


def play(loopback: Loopback, settings: Sequence[str]) -> None:
    """The steps of the guide."""
    print("2. certificates of the server", flush=True)
    loopback.certificates()
    print("3. the server's SuperLink and gate, the signed app", flush=True)
    loopback.start_link()
    loopback.sign_app()
    print("4. certificates and keys of the sites, their admission, their gates and SuperNodes", flush=True)
    for site in SITES:
        loopback.register(site)
        loopback.start_node(site, loopback.folder / site / "data")
    print("5. the run", flush=True)
    named = f"deployment.sites=[{','.join(SITES)}]"
    told = loopback.run(*settings, named, "data.root=unused", f"output={loopback.folder / 'across'}")
    print(told[told.rfind("test dice, ") :], flush=True)


def draw_site(root: Path, site: str, number: int, cases: int = 10) -> None:
    """Synthetic images and masks in ROOT/SITE/images and ROOT/SITE/masks."""
    dials = Dials(appearance=0.5, annotation=0.5, structure=0.3, amount=0.0)
    for kind in ("images", "masks"):
        (root / site / kind).mkdir(parents=True)
    for index in range(cases):
        sample = draw_case("fundus", 0, number, index, dials, resolution=64)
        if sample.labels is None:
            raise AssertionError("the phantom labels every case")
        name = f"patient_{index:03d}.png"
        cv2.imwrite(str(root / site / "images" / name), cv2.cvtColor(sample.image[0], cv2.COLOR_RGB2BGR))
        cv2.imwrite(str(root / site / "masks" / name), sample.labels[0])


def compare(folder: Path) -> int:
    """Compare the table, the server's tensors and what each site kept; returns the number of differences."""
    across, here = RunFolder(folder / "across"), RunFolder(folder / "in-process")
    differences = []
    if (across.path / "summary.md").read_text() != (here.path / "summary.md").read_text():
        differences.append("the tables")
    there, reference = (Checkpoint(run.checkpoints).load() for run in (across, here))
    if there is None or reference is None:
        raise AssertionError("a run left no checkpoint")
    if not same(there.server, reference.server):
        differences.append("the server's tensors")
    run = (across.path / "run-id.txt").read_text().strip()
    for site in SITES:
        kept = Kept(folder / site / "state" / run / "kept").before(QueryTask("publish", reference.round, 0))
        if not same(kept, reference.kept[site]):
            differences.append(f"what {site} kept")
    print(f"\ndifferent: {', '.join(differences)}" if differences else "\nboth runs ended the same, bit for bit")
    return len(differences)


def same(a: State, b: State) -> bool:
    """Whether two states hold the same tensors, bit for bit."""
    return a.tensors.keys() == b.tensors.keys() and all(
        tensors.keys() == b[group].keys() and all(torch.equal(t, b[group][name]) for name, t in tensors.items())
        for group, tensors in a.tensors.items()
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

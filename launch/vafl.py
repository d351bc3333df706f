"""Images of all sites in the style of the least complex one: `python -m fedseg.launch.vafl DIR [KEY=VALUE ...]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from fedseg.algorithms.functional.complexity import complexity
from fedseg.common.files import write_atomic
from fedseg.common.seeds import derive_seed
from fedseg.configs.compose import ConfigError
from fedseg.datamodules import DataError, MultiCenterDataModule
from fedseg.launch.command import guarded, whole
from fedseg.launch.generative.pictures import (
    images_of,
    prepared,
    read_pictures,
    refuse_written,
    sites_of,
    write_picture,
    write_site,
)
from fedseg.launch.telling import data_of, split
from fedseg.models.generative.networks import Translator
from fedseg.models.generative.translation import Translation, moved, train_translator, translated
from fedseg.models.generative.wgan import Adversarial, made_by, train_generator
from fedseg.privacy.memorised import may_leave
from fedseg.reporting.folder import file_name

HELP = f"""python -m fedseg.launch.vafl DIR [KEY=VALUE ...]                       how complex each site's images are
python -m fedseg.launch.vafl DIR site=NAME give=GIVEN                  at the least complex site: images that are made,
                                                                       in a folder to look at, and to hand to the others
python -m fedseg.launch.vafl DIR site=NAME output=OUT                  there: its data, as they are
python -m fedseg.launch.vafl DIR site=NAME given=GIVEN output=OUT      at every other site: its data in that style
python -m fedseg.launch.vafl DIR site=NAME translator=FILE output=OUT  of new images there, by what was trained
python -m fedseg.launch.vafl DIR give=GIVEN output=OUT                 all of it, where the data of all sites lie
python train.py data=folder data.root=OUT ...                          then any method, with the same patients in splits

  images=N             that are given; 64
  steps=N              of the generator; {Adversarial.steps}
  translation_steps=N  of a translator; {Translation.steps}
  seed=N               of everything; 0

Settings of the data are those of python train.py, data.size=32, 64 or 128 among them. All data are written on that
grid, in 8 bit. What is made is written only if it is no copy of a training image (docs/methods/generative.md)."""
OWN: Mapping[str, str] = {
    "site": "",
    "give": "",
    "given": "",
    "translator": "",
    "output": "",
    "images": "64",
    "steps": str(Adversarial.steps),
    "translation_steps": str(Translation.steps),
    "seed": "0",
}
NUMBERS = {"images": 1, "steps": 1, "translation_steps": 1, "seed": 0}
"""Words that are whole numbers, and the least of each."""
T = TypeVar("T")
CANDIDATES = 8
"""Made images for each that is to leave."""
FILE = "translator.safetensors"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return guarded(_run, arguments, help=HELP)


def _run(arguments: Sequence[str]) -> None:
    own, rest = split(arguments, OWN)
    numbers = {name: whole(name, own[name], least) for name, least in NUMBERS.items()}
    _check(own)
    data = prepared(data_of(rest, HELP))
    sites = sites_of(data, own["site"])
    output = Path(own["output"]) if own["output"] else None
    for site in sites if output else ():
        refuse_written(Path(own["output"]), site)
    measured = not (own["given"] or own["translator"] or own["site"] in data.unseen_sites)
    givers = _least_complex(data, [own["site"]] if own["site"] else []) if measured else []
    if own["give"]:
        if not givers:
            raise DataError(f"site={own['site']} takes no part (data.unseen); another site makes the images")
        _give(data, givers[0], Path(own["give"]), numbers)
    given = Path(own["given"] or own["give"]) if not own["site"] or own["given"] else None
    for site in sites if output else ():
        stays = site in data.unseen_sites or (site in givers and (own["give"] or own["site"]))
        _translate(data, site, None if stays else given, own["translator"], Path(own["output"]), numbers)


def _check(own: Mapping[str, str]) -> None:
    """Words that go together.

    Raises:
        ConfigError: they do not.
    """
    if own["give"] and own["given"]:
        raise ConfigError("give= writes the images that are made, and given= reads them; name one")
    if own["translator"] and (own["give"] or own["given"] or not own["site"]):
        raise ConfigError("translator= is a site's own: give site=NAME translator=FILE output=OUT")
    if (own["given"] or own["translator"]) and not own["output"]:
        raise ConfigError("output=OUT is missing: where the site's data in the new style go")
    if own["given"] and not own["site"]:
        raise ConfigError("given= is for a site that takes the style, which the giver does not; name it: site=NAME")
    if own["output"] and not (own["site"] or own["give"]):
        raise ConfigError("output= alone says not what of; add give=GIVEN, or site=NAME")
    if own["give"] and (place := Path(own["give"])).exists() and any(place.iterdir()):
        raise ConfigError(f"give={place} is not empty; name a new folder")


def _least_complex(data: MultiCenterDataModule, only: Sequence[str]) -> list[str]:
    """Print how complex sites are; the one whose images are the least so, first."""
    numbers = {}
    for site in only or data.sites:
        found = complexity([images_of(data, site, "train")])
        numbers[site] = (float(found["entropy"]), float(found["spread"]))
        print(f"{site}: entropy {numbers[site][0]:.3f} bits, images' means vary by {numbers[site][1]:.5f}", flush=True)
    order = sorted(numbers, key=lambda site: (*numbers[site], site))
    if len(order) > 1:
        print(f"the least complex: {order[0]}")
    return order[:1]


def _give(data: MultiCenterDataModule, site: str, folder: Path, numbers: Mapping[str, int]) -> None:
    """Make images like a site's, and write those that may leave.

    Raises:
        DataError: none may, or that cannot be told.
    """
    seed = derive_seed("vafl", "give", numbers["seed"])
    images, held_out = images_of(data, site, "train"), images_of(data, site, "val")
    how = Adversarial(steps=numbers["steps"])
    generator, took = _timed(lambda: train_generator(images, how, seed))
    made = made_by(generator, CANDIDATES * numbers["images"], derive_seed(seed, "made"))
    try:
        chosen = may_leave(made, images, held_out, numbers["images"])
    except ValueError as error:
        raise DataError(f"site {site!r}: {error}") from error
    for number, image in enumerate(made[chosen], 1):
        write_picture(folder / f"made_{number:04d}.png", image)
    print(
        f"{folder}: {len(chosen)} of {len(made)} images that a generator made after {how.steps} steps on "
        f"{len(images)} of {site} ({took}); look at them before they leave",
        flush=True,
    )


def _translate(
    data: MultiCenterDataModule,
    site: str,
    given: Path | None,
    translator: str,
    output: Path,
    numbers: Mapping[str, int],
) -> None:
    """Write a site's data, in the style of given images, by a translator that was trained, or as they are."""
    if translator:
        network = read_translator(Path(translator), data.image_channels)
        write_site(data, site, output, lambda images: translated(network, images))
        print(f"{output}: {site}, by {translator}", flush=True)
        return
    if given is None:
        write_site(data, site, output, lambda images: images)
        print(f"{output}: {site}, as it is", flush=True)
        return
    own, style = images_of(data, site, "train"), read_pictures(given, data.image_channels, data.size)
    how = Translation(steps=numbers["translation_steps"])
    seed = derive_seed("vafl", "translate", site, numbers["seed"])
    network, took = _timed(lambda: train_translator(own, style, how, seed))
    write_site(data, site, output, lambda images: translated(network, images))
    kept = output / file_name(site) / FILE
    write_translator(network, kept)
    after = float(moved(translated(network, own), own))
    print(
        f"{output}: {site} in the style of {given} after {how.steps} steps ({took}); its outlines moved by {after:.3f} "
        f"of 1; {kept} stays at the site",
        flush=True,
    )


def _timed(train: Callable[[], T]) -> tuple[T, str]:
    begun = time.process_time()
    made = train()
    return made, f"{(time.process_time() - begun) / 60:.1f} CPU minutes"


def write_translator(network: Translator, path: Path) -> None:
    """Keep a translator."""
    settings = {name: str(value) for name, value in network.settings.items()}
    write_atomic(path, save(network.state_dict(), metadata=settings), private=True)


def read_translator(path: Path, channels: int) -> Translator:
    """A translator that was kept.

    Args:
        path: of its file.
        channels: of the images it is to translate.

    Raises:
        ConfigError: the file holds none, or one of other images.
    """
    try:
        with safe_open(path, framework="pt") as file:
            settings = {name: int(value) for name, value in (file.metadata() or {}).items()}
            network = Translator(**settings)
        network.load_state_dict(load_file(path))
    except (OSError, SafetensorError, ValueError, TypeError, RuntimeError) as error:
        raise ConfigError(f"translator={path} holds no translator ({error}); it is OUT/SITE/{FILE}") from error
    if settings["channels"] != channels:
        raise ConfigError(f"translator={path} is of images of {settings['channels']} channels, these have {channels}")
    return network.eval()


if __name__ == "__main__":
    sys.exit(main())

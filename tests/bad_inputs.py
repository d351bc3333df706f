"""The table of bad inputs: what a user may give by mistake, and what must be named in the answer."""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK
from PIL import Image

from tests.data_files import make_site, picture, save, save_volume, square, write_manifest


@dataclass(frozen=True)
class World:
    """What a test may spoil: copies of its own.

    Attributes:
        root: two sites, north and south, of six pictures each.
        run: a finished run of Ditto on them.
        new: a folder for whatever a command writes.
    """

    root: Path
    run: Path
    new: Path

    def picture(self, number: int = 3, site: str = "north", kind: str = "images") -> Path:
        """One file of a site."""
        return self.root / site / kind / f"case_{number:02d}.png"


@dataclass(frozen=True)
class Bad:
    """One bad input.

    Attributes:
        name: of the kind.
        told: words that the answer must hold: the file, site or key, and the cure.
        spoil: what is done to the world.
        words: the command line, after what the command needs anyway.
    """

    name: str
    told: tuple[str, ...]
    spoil: Callable[[World], object] = lambda world: None
    words: Callable[[World], Sequence[str]] = lambda world: ()


# --- settings ---------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = (
    *("federation.rounds=0", "federation.rounds=-1", "federation.rounds=1.5", "federation.rounds=null"),
    *("federation.local_steps=0", "federation.local_epochs=0", "federation.fraction=0", "federation.fraction=1.1"),
    *("federation.dropout=1", "federation.dropout=-0.1", "federation.min_sites=0", "federation.work_spread=1"),
    *("federation.server_lr=0", "federation.evaluate_every=0", "federation.checkpoint_every=0"),
    *("federation.sampling=random", "federation.fraction=nan", "federation.server_lr=inf"),
    *("training.lr=0", "training.lr=-1", "training.lr=nan", "training.lr=inf", "training.lr=1e-3x"),
    *("training.momentum=1", "training.weight_decay=-1", "training.loss=dise", "training.optimizer=adamm"),
    *("training.normalize=imagnet", "training.optimizer_state=forget", "training.channels_last=maybe"),
    *("trainer.accelerator=cuda:0", "trainer.precision=16", "trainer.gradient_clip=0", "trainer.threads=0"),
    *("trainer.deterministic=2", "evaluation.metrics=[dise]", "evaluation.metrics=[]", "evaluation.tolerance=-1"),
    *("evaluation.overlays=some", "wandb.mode=on", "wandb.mode=dryrun", "wandb.artifacts=2"),
    *("privacy.mechanism=dp", "privacy.clip=0", "privacy.noise=0", "privacy.delta=1", "privacy.delta=0"),
    *("privacy.accountant=gdp", "privacy.randomness=true", "privacy.aggregation=sum", "privacy.share=0"),
    *("privacy.max_epsilon=0", "compression.cast=int8", "compression.top_k=0", "compression.top_k=2"),
    *("data.size=0", "data.size=[32]", "data.size=[32, 0]", "data.size=big", "data.channels=0", "data.batch_size=0"),
    *("data.split=[1]", "data.split=[0.5, 0.5, 0.5]", "data.split=[0, 0.5, 0.5]", "data.split=[1.2, -0.1, -0.1]"),
    *("data.split_seed=one", "data.labelled_patients=0", "data.sampling=random", "data.augment=heavy"),
    *("data.cache=ram", "data.workers=-1", "data.neighbours=-1", "data.intensity=hu", "data.intensity=window"),
    *("data.percentiles=[99, 1]", "data.percentiles=[1]", "data.percentiles=[0, 101]", "data.window=[1]"),
    *("data.window=[240, -160]", "data.axis=3", "data.regions={}", "data.regions={a: []}", "data.regions={a: [0]}"),
    *("data.regions={a: [256]}", "data.regions={a: [1, 1]}", "data.regions=[1]", "data.label_values={x: 1}"),
    *("data.label_values={255: 256}", "data.label_values={255: one}", "data.missing_masks=ignore"),
    *("data.patient_pattern='['", "data.patient_pattern=case", "data.canonical=perhaps", "data.exclusive=3"),
    *("model.encoder=resnet999", "model.architecture=yolo", "model.norm=layer", "model.groups=0"),
    *("model.encoder_depth=0", "model.decoder_channels=[0]", "model.freeze_encoder=partly", "model.options=[1]"),
    *("algorithm.lam=-1", "algorithm.lam=strong", "algorithm=dito", "algorithm.personal=everywhere", "model=unett"),
    *("protocol=leave_one_out", "engine=threads", "seed=one", "seed=1.5", "seed=null", "resume=perhaps"),
)
"""Values that a setting cannot have. The answer names the setting."""

UNKNOWN = (
    *("federation.round=3", "federaton=3", "rounds=3", "algoritm=ditto", "algorithm.lamda=1", "data.roots=x"),
    *("model.encoders=x", "training.learning_rate=1", "trainer.gpus=1", "trainer.max_epochs=3", "wandb.modes=online"),
    *("evaluation.metric=dice", "privacy.eps=1", "compression.bits=8", "epochs=3", "lr=1", "batch_size=4", "gpu=0"),
)
"""Settings that do not exist. The answer names them."""

NO_SETTINGS = ("federation.rounds", "--rounds=3", "rounds", "-x", "=3", "data", "federation=3", "training=adam")
"""Words that are no settings."""


# --- data -------------------------------------------------------------------------------------------------------------


def _spoilt(number: int, content: bytes, kind: str, suffix: str) -> Callable[[World], object]:
    def spoil(world: World) -> None:
        world.picture(number, kind=kind).unlink()
        world.picture(number, kind=kind).with_suffix(suffix).write_bytes(content)

    return spoil


def _rows(world: World) -> list[dict[str, str]]:
    return [
        {
            "site": site,
            "image": f"{site}/images/{path.name}",
            "mask": f"{site}/masks/{path.name}",
            "case": path.stem,
            "patient": path.stem,
            "split": "",
        }
        for site in ("north", "south")
        for path in sorted((world.root / site / "images").iterdir())
    ]


def _table(change: Callable[[list[dict[str, str]]], Sequence[dict[str, str]]]) -> Callable[[World], object]:
    return lambda world: write_manifest(world.root / "sites.csv", change(_rows(world)))


def _inside(path: Path, folder: str) -> Path:
    """The same file in a folder beside it."""
    (path.parent / folder).mkdir(exist_ok=True)
    return path.parent / folder / path.name


def _volume(
    array: np.ndarray, affine: np.ndarray | None = None, mask: np.ndarray | None = None
) -> Callable[[World], object]:
    def spoil(world: World) -> None:
        for kind in ("images", "masks"):
            world.picture(kind=kind).unlink()
        place = world.root / "north"
        save_volume(place / "images" / "case_03.nii.gz", array, affine)
        outline = np.zeros(array.shape, np.uint8) if mask is None else mask
        if mask is None:
            outline[outline.shape[0] // 3 : outline.shape[0] // 2 + 1, 2:9] = 1
        save_volume(place / "masks" / "case_03.nii.gz", outline, affine)

    return spoil


def _without_space(world: World) -> None:
    """A header whose second axis has no voxel size, which libraries refuse to write."""
    _volume(np.random.default_rng(0).normal(size=(16, 16, 4)).astype(np.float32))(world)
    for kind in ("images", "masks"):
        zipped = world.root / "north" / kind / "case_03.nii.gz"
        content = bytearray(gzip.decompress(zipped.read_bytes()))
        content[280:328] = np.diag([1.0, 0.0, 1.0, 1.0])[:3].astype("<f4").tobytes()
        zipped.write_bytes(gzip.compress(bytes(content)))


def _itk(suffix: str, change: Callable[[bytes], bytes], kind: str = "images") -> Callable[[World], object]:
    """A volume as image and mask, stored without compression, one of them changed afterwards."""

    def spoil(world: World) -> None:
        voxels = np.random.default_rng(0).normal(100, 9, (4, 16, 16)).astype(np.float32)
        outline = np.zeros(voxels.shape, np.uint8)
        outline[1:3, 2:9, 4:12] = 1
        for role, array in {"images": voxels, "masks": outline}.items():
            world.picture(kind=role).unlink()
            path = world.picture(kind=role).with_suffix(suffix)
            SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(path))
            if role == kind:
                path.write_bytes(change(path.read_bytes()))

    return spoil


def _without_voxels(world: World) -> None:
    _itk(".mhd", lambda content: content)(world)
    world.picture().with_suffix(".raw").unlink()


SUFFIXES = (
    *(".png", ".jpg", ".tif", ".gif", ".bmp", ".pgm", ".npy", ".nii", ".nii.gz"),
    *(".nrrd", ".nhdr", ".mha", ".mhd"),
)
GARBAGE = {"empty": b"", "text": b"this is no picture\n" * 9, "cut": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00"}
CASE = ("north", "case_03")

BROKEN_FILES = tuple(
    Bad(f"{kind} {suffix} {what}", CASE, _spoilt(3, content, kind, suffix))
    for suffix in SUFFIXES
    for kind in ("images", "masks")
    for what, content in GARBAGE.items()
)

BAD_DATA = (
    *BROKEN_FILES,
    Bad("no mask", (*CASE, "missing_masks=unlabelled"), lambda w: w.picture(kind="masks").unlink()),
    Bad("no image", (*CASE, "remove it"), lambda w: w.picture().unlink()),
    Bad("no folder of masks", ("north", "masks"), lambda w: shutil.rmtree(w.root / "north/masks")),
    Bad("no folder of images", ("north", "images"), lambda w: shutil.rmtree(w.root / "north/images")),
    Bad(
        "masks in folders that are no regions",
        ("north", "masks", "data.regions="),
        lambda w: [p.rename(_inside(p, "disc")) for p in sorted((w.root / "north/masks").iterdir())],
    ),
    Bad(
        "images in folders that are no modalities",
        ("north", "images", "data.modalities=[t1]"),
        lambda w: [p.rename(_inside(p, "t1")) for p in sorted((w.root / "north/images").iterdir())],
    ),
    Bad(
        "a mask beside the folder of a region",
        ("north", "case_00.png", "beside"),
        lambda w: save(w.root / "north/masks/foreground/case_00.png", picture(0, channels=1)),
    ),
    Bad(
        "masks that say their number",
        ("north", "mask_suffix", "_*"),
        lambda w: [
            shutil.copy(p.rename(p.with_stem(f"{p.stem}_1")), p.with_stem(f"{p.stem}_2"))
            for p in sorted((w.root / "north/masks").iterdir())
        ],
    ),
    Bad(
        "images of several modalities",
        ("north", "data.modalities=[0000,0001]"),
        lambda w: [
            shutil.copy(p.rename(p.with_stem(f"{p.stem}_0000")), p.with_stem(f"{p.stem}_0001"))
            for p in sorted((w.root / "north/images").iterdir())
        ],
    ),
    Bad("an empty folder of images", ("north",), lambda w: [p.unlink() for p in (w.root / "north/images").iterdir()]),
    Bad("a foreign file", ("notes.txt", "move"), lambda w: (w.root / "north/images/notes.txt").write_text("x")),
    Bad("a folder among images", ("more", "move"), lambda w: (w.root / "north/images/more").mkdir()),
    Bad(
        "two files of one name", ("case_03.jpg", "rename"), lambda w: save(w.picture().with_suffix(".jpg"), picture(3))
    ),
    Bad("images without a site", ("move them",), lambda w: (w.root / "north").rename(w.root / "images")),
    Bad("mask of another size", CASE, lambda w: save(w.picture(kind="masks"), square(8, 24))),
    Bad("mask turned", CASE, lambda w: save(w.picture(kind="masks"), square().T.copy())),
    Bad("unknown label", (*CASE, "4", "data.regions"), lambda w: save(w.picture(kind="masks"), square(label=4))),
    Bad(
        "five channels",
        CASE,
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), picture(3, channels=5))),
    ),
    Bad(
        "too many channels",
        CASE,
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), picture(3, channels=40))),
    ),
    Bad(
        "an array of one dimension",
        CASE,
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), np.zeros(9, np.uint8))),
    ),
    Bad(
        "an array of four dimensions",
        CASE,
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), np.zeros((2, 3, 4, 5), np.uint8))),
    ),
    Bad(
        "an array without pixels",
        CASE,
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), np.zeros((0, 5), np.uint8))),
    ),
    Bad(
        "an array of objects",
        CASE,
        lambda w: (w.picture().unlink(), np.save(w.picture().with_suffix(".npy"), np.array([{}, 3], object))),
    ),
    Bad(
        "complex values",
        CASE,
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), np.zeros((20, 24), complex))),
    ),
    Bad(
        "values that are not finite",
        CASE,
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), np.full((20, 24), np.nan, np.float32))),
    ),
    Bad(
        "infinite values",
        CASE,
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), np.full((20, 24), np.inf, np.float32))),
    ),
    Bad(
        "a soft mask",
        (*CASE, "label_values"),
        lambda w: (
            w.picture(kind="masks").unlink(),
            save(w.picture(kind="masks").with_suffix(".npy"), square() * 0.87),
        ),
    ),
    Bad(
        "a negative label",
        (*CASE, "label_values"),
        lambda w: (
            w.picture(kind="masks").unlink(),
            save(w.picture(kind="masks").with_suffix(".npy"), -square().astype(np.int16)),
        ),
    ),
    Bad(
        "a label beyond 255",
        (*CASE, "label_values"),
        lambda w: (
            w.picture(kind="masks").unlink(),
            save(w.picture(kind="masks").with_suffix(".npy"), square().astype(np.int32) * 1000),
        ),
    ),
    Bad(
        "a mask that is not finite",
        CASE,
        lambda w: (
            w.picture(kind="masks").unlink(),
            save(w.picture(kind="masks").with_suffix(".npy"), np.full((20, 24), np.nan)),
        ),
    ),
    Bad("a photograph as mask", CASE, lambda w: save(w.picture(kind="masks"), picture(7))),
    Bad("a link to nowhere", CASE, lambda w: (w.picture().unlink(), w.picture().symlink_to(w.root / "gone.png"))),
    Bad("an EXIF turn", (*CASE, "upright"), lambda w: _turned(w.picture())),
    Bad(
        "a file of another type",
        ("case_03.dcm", "convert"),
        lambda w: w.picture().rename(w.picture().with_suffix(".dcm")),
    ),
    Bad("a single patient", ("lonely", "data.unseen=[lonely]"), lambda w: make_site(w.root, "lonely", 1)),
    Bad(
        "a site of empty folders",
        ("east", "images"),
        lambda w: [(w.root / "east" / k).mkdir(parents=True) for k in ("images", "masks")],
    ),
    Bad("a site called pooled", ("pooled",), lambda w: (w.root / "north").rename(w.root / "pooled")),
    Bad(
        "no mask shows anything",
        ("north",),
        lambda w: [save(w.picture(n, kind="masks"), square() * 0) for n in range(6)],
    ),
    Bad("a time series", CASE, _volume(np.zeros((16, 16, 4, 2, 2), np.float32))),
    Bad("a volume without space", CASE, lambda w: _without_space(w)),
    Bad(
        "a volume with a lost origin",
        CASE,
        lambda w: (
            _volume(np.ones((16, 16, 4), np.float32), np.diag([2.0, 2, 5, 1]))(w),
            save_volume(
                w.root / "north/masks/case_03.nii.gz", np.ones((16, 16, 4), np.uint8), np.diag([-2.0, 2, 5, 1])
            ),
        ),
    ),
    Bad(
        "a mask of fewer slices",
        CASE,
        lambda w: (
            _volume(np.ones((16, 16, 4), np.float32))(w),
            save_volume(w.root / "north/masks/case_03.nii.gz", np.ones((16, 16, 3), np.uint8)),
        ),
    ),
    *(
        Bad(f"{kind} {suffix} cut short", (*CASE, "cut short", "replace"), _itk(suffix, lambda b: b[:-40], kind))
        for suffix in (".nrrd", ".mha")
        for kind in ("images", "masks")
    ),
    Bad(
        "NRRD of other sizes",
        (*CASE, "export it again"),
        _itk(".nrrd", lambda b: b.replace(b"sizes: 16 16 4", b"sizes: 16 16 3")),
    ),
    Bad(
        "MHD of other sizes",
        (*CASE, "export it again"),
        _itk(".mhd", lambda b: b.replace(b"DimSize = 16 16 4", b"DimSize = 16 16 3")),
    ),
    Bad(
        "NRRD of an odd encoding",
        (*CASE, "odd", "replace"),
        _itk(".nrrd", lambda b: b.replace(b"encoding: raw", b"encoding: odd")),
    ),
    Bad(
        "NRRD without voxel size",
        (*CASE, "SetSpacing"),
        _itk(".nrrd", lambda b: b.replace(b"(0,1,0)", b"(0,0,0)")),
    ),
    Bad(
        "MHA without voxel size",
        (*CASE, "SetSpacing"),
        _itk(".mha", lambda b: b.replace(b"ElementSpacing = 1 1 1\n", b"")),
    ),
    Bad("MHD without voxels", (*CASE, "case_03.raw", "copy it"), _without_voxels),
    Bad("voxels without MHD", ("stray.raw", "move"), lambda w: (w.root / "north/images/stray.raw").write_bytes(b"x")),
    Bad("no site", ("holds no site",), lambda w: [shutil.rmtree(p) for p in w.root.iterdir()]),
    Bad(
        "manifest without a site column",
        ("sites.csv", "'site'"),
        _table(lambda rows: [{"hospital" if k == "site" else k: v for k, v in r.items()} for r in rows]),
    ),
    Bad(
        "manifest without an image column",
        ("sites.csv", "'image'"),
        _table(lambda rows: [{"file" if k == "image" else k: v for k, v in r.items()} for r in rows]),
    ),
    Bad(
        "manifest without a mask column",
        ("sites.csv", "'mask'"),
        _table(lambda rows: [{"truth" if k == "mask" else k: v for k, v in r.items()} for r in rows]),
    ),
    Bad("manifest with an empty site", ("line 2", "'site'"), _table(lambda rows: [rows[0] | {"site": ""}, *rows[1:]])),
    Bad(
        "manifest with an empty image", ("line 2", "'image'"), _table(lambda rows: [rows[0] | {"image": ""}, *rows[1:]])
    ),
    Bad(
        "manifest names no image",
        ("line 2", "gone.png"),
        _table(lambda rows: [rows[0] | {"image": "gone.png"}, *rows[1:]]),
    ),
    Bad(
        "manifest names no mask",
        ("line 2", "gone.png"),
        _table(lambda rows: [rows[0] | {"mask": "gone.png"}, *rows[1:]]),
    ),
    Bad(
        "manifest with a bad split", ("line 2", "trian"), _table(lambda rows: [rows[0] | {"split": "trian"}, *rows[1:]])
    ),
    Bad(
        "manifest with columns of modalities",
        ("sites.csv", "data.modalities=[t1,t2]"),
        _table(lambda rows: [{"image_t1": r["image"], "image_t2": r["image"], "site": r["site"]} for r in rows]),
    ),
    Bad(
        "manifest with masks twice",
        ("sites.csv", "'mask'", "mask_foreground"),
        _table(lambda rows: [r | {"mask_foreground": r["mask"]} for r in rows]),
    ),
    Bad(
        "manifest names a second mask that is not there",
        ("line 2", "gone.png"),
        _table(lambda rows: [rows[0] | {"mask": f"{rows[0]['mask']}|gone.png"}, *rows[1:]]),
    ),
    Bad("manifest with a case twice", ("case_00", "unique"), _table(lambda rows: [rows[0], *rows])),
    Bad(
        "manifest with a patient in two splits",
        ("'p'", "leak"),
        _table(lambda rows: [r | {"patient": "p", "split": "test" if i else "train"} for i, r in enumerate(rows)]),
    ),
    Bad(
        "manifest without training cases",
        ("north", "data.split"),
        _table(lambda rows: [r | {"split": "test"} for r in rows]),
    ),
    Bad("manifest with a slash in a site", ("a/b", "slash"), _table(lambda rows: [r | {"site": "a/b"} for r in rows])),
    Bad(
        "manifest with a name beyond reason",
        ("characters",),
        _table(lambda rows: [rows[0] | {"case": "x" * 300}, *rows[1:]]),
    ),
    Bad(
        "manifest with a cell too many",
        ("line 2", "quote"),
        _table(lambda rows: [rows[0] | {"split": ",extra"}, *rows[1:]]),
    ),
    Bad(
        "manifest without rows",
        ("sites.csv", "add rows"),
        lambda w: (w.root / "sites.csv").write_text("site,image,mask\n"),
    ),
    Bad("manifest of nothing", ("sites.csv",), lambda w: (w.root / "sites.csv").write_bytes(b"")),
    Bad("manifest of zeros", ("sites.csv",), lambda w: (w.root / "sites.csv").write_bytes(b"\0" * 99)),
    Bad(
        "manifest in Latin-1",
        ("sites.csv", "UTF-8"),
        lambda w: (w.root / "sites.csv").write_bytes("site,image,mask\nKöln,a,b\n".encode("latin-1")),
    ),
    Bad(
        "manifest with unlabelled site",
        ("south", "data.unlabelled=[south]"),
        _table(lambda rows: [r | ({"mask": ""} if r["site"] == "south" else {}) for r in rows]),
    ),
    Bad(
        "manifest that is a spreadsheet",
        ("sites.csv",),
        lambda w: (w.root / "sites.csv").write_bytes(b"PK\x03\x04" + bytes(range(256))),
    ),
)
"""Data that cannot be used, whether a run reads them or the check."""


def _turned(path: Path) -> None:
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(path, exif=exif)


# --- folders of runs --------------------------------------------------------------------------------------------------


def _states(damage: str) -> Callable[[World], object]:
    return lambda world: [DAMAGES[damage](path) for path in (world.run / "checkpoints").glob("*.safetensors")]


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "zeros": lambda path: path.write_bytes(b"\0" * 200),
    "binary": lambda path: path.write_bytes(b"\xff\xfe\x00" * 70),
    "of another kind": lambda path: path.write_text("hello\nworld\n"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}

FILES = ("config.yaml", "splits.csv", "inputs.json", "metrics.csv", "checkpoints/index.json")
READS = {  # which files a command cannot do without
    "resume": ("config.yaml", "splits.csv", "metrics.csv", "checkpoints/index.json"),
    "evaluate": ("config.yaml", "checkpoints/index.json"),
    "compare": ("config.yaml", "splits.csv", "metrics.csv"),
    "predict": ("config.yaml", "splits.csv", "inputs.json", "checkpoints/index.json"),
    "export": ("config.yaml", "splits.csv", "inputs.json", "checkpoints/index.json"),
}


def _damaged(file: str, damage: Callable[[Path], object]) -> Callable[[World], object]:
    return lambda world: damage(world.run / file)


BAD_RUNS = {
    command: (
        *(
            Bad(f"{file} {what}", (Path(file).name,), _damaged(file, damage))
            for file in files
            for what, damage in DAMAGES.items()
            if (what, file) != ("cut", "splits.csv")  # a shorter table is a table
            if (what, file, command) != ("cut", "metrics.csv", "resume")  # which makes final scores anew
            if (what, file, command) != ("cut", "config.yaml", "compare")  # half a file of settings may be one
        ),
        Bad("no folder", ("run",), lambda w: w.run.rename(w.run.with_name("gone_away")) and None),
        Bad("no config", ("config.yaml",), lambda w: (w.run / "config.yaml").unlink()),
    )
    for command, files in READS.items()
}
for command in ("resume", "evaluate", "predict", "export"):
    BAD_RUNS[command] += (
        Bad("state cut", ("checkpoints",), _states("cut")),
        Bad("state empty", ("checkpoints",), _states("empty")),
        Bad("state of another kind", ("checkpoints",), _states("of another kind")),
        Bad("no state", ("checkpoint",), lambda w: shutil.rmtree(w.run / "checkpoints")),
    )

BAD_RESUMES = (
    Bad("scores gone", ("metrics.csv", "copy"), lambda w: (w.run / "metrics.csv").unlink()),
    Bad("rounds gone", ("rounds.csv", "copy"), lambda w: (w.run / "rounds.csv").unlink()),
    Bad("another method", ("algorithm",), words=lambda w: ["algorithm=fedavg"]),
    Bad("another seed", ("seed",), words=lambda w: ["seed=9"]),
    Bad("another size", ("data.size",), words=lambda w: ["data.size=64"]),
    Bad("fewer rounds", ("federation.rounds",), words=lambda w: ["federation.rounds=1"]),
    Bad("another network", ("model",), words=lambda w: ["model.encoder=resnet34"]),
    Bad("another learning rate", ("training.lr",), words=lambda w: ["training.lr=0.5"]),
    Bad(
        "a case gone",
        ("north",),
        lambda w: [w.picture(kind=k).unlink() for k in ("images", "masks")],
        lambda w: ["federation.rounds=3"],
    ),
    Bad("a site gone", ("south",), lambda w: shutil.rmtree(w.root / "south"), lambda w: ["federation.rounds=3"]),
    Bad("data gone", ("data.root",), lambda w: shutil.rmtree(w.root), lambda w: ["federation.rounds=3"]),
    Bad(
        "other pixels",
        ("north", "case_03"),
        lambda w: save(w.picture(), picture(99)),
        lambda w: ["federation.rounds=3"],
    ),
    Bad(
        "another mask",
        ("north", "case_03"),
        lambda w: save(w.picture(kind="masks"), square()[::-1].copy()),
        lambda w: ["federation.rounds=3"],
    ),
)

BAD_EVALUATIONS = (
    Bad("a setting of the run", ("seed",), words=lambda w: ["seed=4"]),
    Bad("an unknown setting", ("trainer.gpus",), words=lambda w: ["trainer.gpus=1"]),
    Bad("data gone", ("data.root",), lambda w: shutil.rmtree(w.root)),
    Bad("a mask gone", CASE, lambda w: w.picture(kind="masks").unlink()),
)

BAD_COMPARISONS = (
    Bad("an unknown option", ("metrics",), words=lambda w: ["metrics=dice"]),
    Bad("a metric that was not measured", ("metric",), words=lambda w: ["metric=hd9000"]),
    Bad("confidence beyond 1", ("confidence",), words=lambda w: ["confidence=2"]),
    Bad("output is a file", ("config.yaml",), words=lambda w: [f"output={w.run / 'config.yaml'}"]),
    Bad("output holds something else", ("data", "output"), words=lambda w: [f"output={w.root}"]),
)

BAD_PREDICTIONS = (
    Bad("no images", ("gone",), words=lambda w: ["--images", str(w.new / "gone")]),
    Bad(
        "an empty folder", ("empty",), lambda w: (w.new / "empty").mkdir(), lambda w: ["--images", str(w.new / "empty")]
    ),
    Bad("unknown site", ("nort", "north"), words=lambda w: ["--site", "nort"]),
    Bad("no such model", ("adapted",), words=lambda w: ["--site", "north", "--view", "adapted"]),
    Bad("output exists", ("data", "--out"), words=lambda w: ["--out", str(w.root)]),
    Bad("output is a file", ("config.yaml",), words=lambda w: ["--out", str(w.run / "config.yaml")]),
    Bad("a broken image", ("case_03",), lambda w: w.picture().write_bytes(b"\x89PNG")),
    Bad("a foreign file", ("notes.txt",), lambda w: (w.root / "north/images/notes.txt").write_text("x")),
    Bad(
        "another number of channels",
        ("case_03", "channel"),
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), picture(3, channels=5))),
    ),
    Bad(
        "values that are not finite",
        ("case_03",),
        lambda w: (w.picture().unlink(), save(w.picture().with_suffix(".npy"), np.full((20, 24), np.nan, np.float32))),
    ),
)

BAD_EXPORTS = (
    Bad("unknown site", ("nort", "north"), words=lambda w: ["--site", "nort"]),
    Bad("output exists", ("data", "--out"), words=lambda w: ["--out", str(w.root)]),
    Bad("output is a file", ("config.yaml",), words=lambda w: ["--out", str(w.run / "config.yaml")]),
)


# --- sweeps -----------------------------------------------------------------------------------------------------------


def _sweep(text: str) -> Callable[[World], object]:
    return lambda world: (world.new / "sweep.yaml").write_text(text)


GOOD = """program: train.py
method: grid
command: ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
parameters:
  algorithm: {values: [fedavg, ditto]}
"""
BAD_SWEEPS = (
    Bad("no such file", ("gone",), words=lambda w: ["gone"]),
    Bad("no YAML", ("sweep.yaml",), _sweep("{")),
    Bad("empty", ("sweep.yaml",), _sweep("")),
    Bad("a list", ("sweep.yaml",), _sweep("- 1\n")),
    Bad("binary", ("sweep.yaml",), lambda w: (w.new / "sweep.yaml").write_bytes(b"\xff\xfe\x00")),
    Bad("no method", ("method",), _sweep(GOOD.replace("method: grid\n", ""))),
    Bad("unknown method", ("method", "gird"), _sweep(GOOD.replace("grid", "gird"))),
    Bad("no parameters", ("parameters",), _sweep(GOOD.partition("parameters")[0])),
    Bad("another program", ("other.py",), _sweep(GOOD.replace("train.py", "other.py"))),
    Bad("unknown setting", ("algoritm",), _sweep(GOOD.replace("algorithm:", "algoritm:"))),
    Bad("a value out of range", ("federation.rounds",), _sweep(GOOD + "  federation.rounds: {value: 0}\n")),
    Bad("no values", ("algorithm",), _sweep(GOOD.replace("[fedavg, ditto]", "[]"))),
    Bad("values that are none", ("algorithm",), _sweep(GOOD.replace("[fedavg, ditto]", "3"))),
    Bad("unknown key", ("parametres",), _sweep(GOOD + "parametres: {}\n")),
    Bad(
        "an unknown distribution",
        ("seed", "normall"),
        _sweep(GOOD.replace("grid", "random") + "  seed: {distribution: normall}\nrun_cap: 2\n"),
    ),
    Bad(
        "bounds that fall",
        ("training.lr",),
        _sweep(GOOD.replace("grid", "random") + "  training.lr: {min: 1.0, max: 0.1}\nrun_cap: 2\n"),
    ),
    Bad("a grid without end", ("seed",), _sweep(GOOD + "  seed: {distribution: uniform, min: 0, max: 1}\n")),
    Bad("random without a count", ("count",), _sweep(GOOD.replace("grid", "random"))),
    Bad(
        "too many runs",
        ("runs", "count"),
        _sweep(
            GOOD
            + "".join(
                f"  federation.{k}: {{values: {list(range(1, 1001))}}}\n"
                for k in ("rounds", "local_steps", "evaluate_every", "checkpoint_every")
            )
        ),
    ),
    Bad("jobs below one", ("jobs",), _sweep(GOOD), lambda w: ["jobs=0"]),
    Bad("count below one", ("count",), _sweep(GOOD), lambda w: ["count=-1"]),
    Bad("an unknown word", ("federation.round",), _sweep(GOOD), lambda w: ["federation.round=3"]),
)

"""Which folders of a data set are sites, and where a site's images and masks lie."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedseg.datamodules.findings import Finding, Report, few, refuse
from fedseg.datamodules.pairing import folder_cure
from fedseg.datamodules.readers import FLAT, VOLUMES, stem_of, suffix_of
from fedseg.datamodules.readers.headers import data_files
from fedseg.datamodules.readers.kinds import SERIES, hidden, is_case_file, there

KNOWN = (*FLAT, *VOLUMES)
CALLED = {
    "images": {"images", "image", "imgs", "img", "imagestr", "imagests", "pictures", "photos", "scans"},
    "masks": {
        *("masks", "mask", "labels", "label", "labelstr", "annotations", "annotation", "segmentations", "segmentation"),
        *("seg", "gt", "groundtruth", "ground_truth", "manual"),
    },
}
# What the commands of this suite leave: a run, a fold or a sweep of runs, a data check, a comparison.
OUTPUTS = (("config.yaml", "environment.json"), ("config.yaml", "summary.csv"), ("findings.csv", "report.md"))
SINGLE_OUTPUTS = (".lock", "sweep.csv", "run-id.txt", "wandb-id.txt")


def site_folders(root: Path, report: Report) -> list[Path]:
    """The folders that hold a site.

    Args:
        root: The folder of all sites.
        report: Told of images without a site, of no site at all, and of what is left out.
    """
    if not there(root.is_dir):
        report(Finding("layout", f"data.root={root} is no folder", "set data.root to the folder that holds the sites"))
        return []
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    if loose := _without_site(folders):
        cure = f"move them ({few(loose)}) to {root}/<site>/images and {root}/<site>/masks"
        report(Finding("layout", f"{root} holds images without a site", cure))
        return []
    sites = [path for path in folders if _is_site(path, report)]
    if not sites:
        cure = "give each site a folder with the folders images and masks, or write a manifest sites.csv"
        report(Finding("layout", f"{root} holds no site", cure))
    return sites


def _without_site(folders: Sequence[Path]) -> list[str]:
    """Folders of images and masks that lie where sites should."""
    plain = [path.name for path in folders if path.name.lower() in CALLED]
    bare = [path.name for path in folders if not any(_called(path, kind) for kind in CALLED)]
    alike = [name for name in bare if name.lower() in CALLED["images"] | CALLED["masks"]]
    return plain or (alike if len({name.lower() in CALLED["images"] for name in alike}) == 2 else [])


def _is_site(folder: Path, report: Report) -> bool:
    """Whether a folder takes part; what is left out is told."""
    if any(_called(folder, kind) for kind in CALLED):
        return True
    if is_output(folder):
        report(Finding("left out", "was written by this suite", "none needed", file=str(folder)))
        return False
    if not _holds_pictures(folder):
        what, cure = "is no site: it holds neither images nor masks", "add them if it is one, else ignore this"
        report(Finding("not a site", what, cure, file=str(folder)))
        return False
    return True


def is_output(folder: Path) -> bool:
    """Whether a command of this suite wrote a folder, or everything in it."""
    names = {path.name for path in folder.iterdir()}
    if any(name in names for name in SINGLE_OUTPUTS) or any(names.issuperset(files) for files in OUTPUTS):
        return True
    inside = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return bool(inside) and all(path.is_dir() and is_output(path) for path in inside)


def _holds_pictures(folder: Path) -> bool:
    """Whether there are images, in the folder or in a folder of it."""
    for path in folder.iterdir():
        inside = path.iterdir() if path.is_dir() else [path]
        if any(suffix_of(file) in KNOWN for file in inside):
            return True
    return False


def _called(site: Path, kind: str) -> list[Path]:
    """Folders of a site that may be its images, or its masks."""
    if there((site / kind).is_dir):
        return [site / kind]
    return [path for path in sorted(site.iterdir()) if path.is_dir() and path.name.lower() in CALLED[kind]]


def folder_of(site: Path, kind: str, report: Report, given: str | None = None) -> Path:
    """The folder of a site's images or masks.

    Args:
        site: The site's folder.
        kind: "images" or "masks".
        report: Told where it has another name, and of several that it may be.
        given: Its name, where the site's settings tell it.
    """
    if given is not None:
        return site / given
    found = _called(site, kind)
    if not found or found == [site / kind]:
        return site / kind
    if len(found) == 1:
        what = f"{found[0].name} is taken for the folder {kind}"
        report(Finding("folder name", what, f"none needed; {kind} is the usual name", site.name, file=str(found[0])))
        return found[0]
    names = [path.name for path in found]
    what = f"has no folder {kind}, but {few(names)}"
    cure = f"rename one to {kind}, or write '{kind}: {names[0]}' into {site.name}/site.yaml"
    report(Finding("layout", what, cure, site.name, file=str(site)))
    return site / kind


def files_by_folder(
    folder: Path, kind: str, names: Sequence[str], report: Report = refuse, site: str = ""
) -> dict[str, dict[str, Path]]:
    """Files of a folder by sub-folder and stem; those of the folder itself are under "" where it has no such ones.

    Args:
        folder: Of a site's images or masks.
        kind: "images" or "masks".
        names: Sub-folders that may be there: the modalities of images, the regions of masks.
        report: Told of files beside such sub-folders, of other sub-folders, and as by :func:`image_files`.
        site: Whose folder it is.
    """
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir()] if folder.is_dir() else []
    inside = [path for path in inside if not path.name.startswith(".")]
    known = [path for path in inside if path.name in names]
    if not known:
        if inside and not any(is_case_file(path) and suffix_of(path) in KNOWN for path in folder.iterdir()):
            apart = [path.name for path in inside]
            what = f"holds no image, but the folders {few(apart)}"
            report(Finding("layout", what, folder_cure(kind, apart), site, file=str(folder)))
            return {"": {}}
        return {"": image_files(folder, report, site)}
    for path in sorted(folder.iterdir()):
        if path not in known and not hidden(path):
            what, cure = f"lies beside the folders {few([one.name for one in known])}", "move it into one, or elsewhere"
            report(Finding("foreign file", what, cure, site, stem_of(path), str(path)))
    return {path.name: image_files(path, report, site) for path in known}


def image_files(folder: Path, report: Report = refuse, site: str = "") -> dict[str, Path]:
    """Files of a folder by stem; none where there is no folder.

    Args:
        folder: Not searched deeper.
        report: Told of whatever is no image, rather than leaving it out in silence, and of two files of one stem, of
            which the first counts.
        site: Whose folder it is.
    """
    files: dict[str, Path] = {}
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    # an .mhd has its voxels beside it
    held = {part for path in paths if path.is_file() for part in data_files(path) if suffix_of(part) not in KNOWN}
    for path in paths:
        if hidden(path) or path in held:
            continue
        stem = stem_of(path)
        if path.is_dir() and suffix_of(path) != SERIES:
            cure = "move it; the folder of a DICOM series holds its files, not further folders"
            report(Finding("foreign file", "is a folder among images", cure, site, stem, str(path)))
        elif suffix_of(path) not in KNOWN:
            what = f"is none of {', '.join(KNOWN)}"
            report(Finding("foreign file", what, "move or convert it", site, stem, str(path)))
        elif stem in files:
            what = f"is the same case as {files[stem].name}"
            report(Finding("ambiguous name", what, "rename or remove one", site, stem, str(path)))
        else:
            files[stem] = path
    return files

"""Resizing and augmentation."""

from pathlib import Path

import numpy as np
import pytest

from fedseg.datamodules import DataError, Sample
from fedseg.datamodules.transforms import FOLDER, load_augmentation, resize, to_grey
from tests.data_files import picture, square


def pipeline(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text)
    return str(tmp_path / "mine.yaml")


def test_resizing_averages_images_keeps_labels_and_moves_the_spacing() -> None:
    image = np.zeros((1, 4, 8, 1), np.uint8)
    image[0, :2, :4] = 100
    labels = (image[..., 0] > 0).astype(np.uint8) * 7
    small = resize(Sample(image, labels, (3.0, 1.0, 1.0)), (2, 2))
    assert small.image[0, ..., 0].tolist() == [[100, 0], [0, 0]]
    assert small.labels is not None
    assert small.labels[0].tolist() == [[7, 0], [0, 0]]
    assert small.spacing == (3.0, 2.0, 4.0)
    checks = (np.indices((4, 4)).sum(0) % 2 * 200).astype(np.uint8)[None, ..., None]
    assert np.unique(resize(Sample(checks, None), (2, 2)).image).tolist() == [100]


def test_resizing_keeps_types_channels_and_label_ids() -> None:
    image = np.random.default_rng(0).random((3, 20, 24, 5), dtype=np.float32)
    labels = np.stack([square(label=9)] * 3)
    large = resize(Sample(image, labels), (33, 47))
    assert (large.image.shape, large.image.dtype) == ((3, 33, 47, 5), np.float32)
    assert large.labels is not None
    assert set(np.unique(large.labels)) == {0, 9}
    assert large.image.max() <= 1
    small = resize(Sample(image, labels), (10, 12)).image
    assert np.array_equal(small[..., 4:], resize(Sample(image[..., 4:], labels), (10, 12)).image)


def test_grey_is_luminance() -> None:
    image = np.zeros((1, 1, 3, 3), np.uint8)
    image[0, 0] = np.eye(3) * 255
    assert to_grey(Sample(image, None)).image[0, 0, :, 0].tolist() == [76, 150, 29]


def test_flips_are_independent_of_each_other() -> None:
    flips = load_augmentation("flips")
    corner = np.zeros((4, 4, 1), np.uint8)
    corner[0, 0] = 1
    places = [tuple(np.argwhere(flips(corner, None, seed)[0][0])[0][:2].tolist()) for seed in range(400)]
    counts = {place: places.count(place) for place in set(places)}
    assert set(counts) == {(0, 0), (0, 3), (3, 0), (3, 3)}
    assert all(60 < count < 140 for count in counts.values())


def test_masks_move_with_images_and_values_stay() -> None:
    move = load_augmentation("strong").geometric
    assert move.transforms
    strong = load_augmentation("strong")
    labels = square(64, 64, label=3)
    for seed in range(20):
        (image,), moved = strong(labels[..., None] * 80, labels, seed)
        assert moved is not None
        assert set(np.unique(moved)) <= {0, 3}
        if moved.any() and (moved == 0).any():
            assert image[moved == 3].mean() > image[moved == 0].mean() + 40


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_every_pipeline_takes_every_image(name: str, channels: int, kind: type) -> None:
    image = picture(1, 32, 40, 8)[..., :channels]
    image = image if kind is np.uint8 else (image / np.float32(255)).astype(np.float32)
    augmentation, mask = load_augmentation(name), square(32, 40)
    if augmentation.flip_slices:
        image, mask = np.stack([image, image // 2, image // 3]), np.stack([mask] * 3)
    augmentation.try_on(image)
    before = image.copy()
    (first,), labels = augmentation(image, mask, 5)
    (again,), _ = augmentation(image, mask, 5)
    assert (first.shape, first.dtype) == (image.shape, kind)
    assert labels is not None
    assert np.array_equal(first, again)
    assert np.array_equal(image, before)
    assert name == "none" or any(not np.array_equal(augmentation(image, None, s)[0][0], image) for s in range(5))


@pytest.mark.parametrize(("share", "seen"), [(0.0, {0}), (0.5, {0, 1}), (1.0, {1})])
def test_slices_of_a_volume_come_in_reverse_with_their_masks_and_for_all_views(
    share: float, seen: set[int], tmp_path: Path
) -> None:
    augmentation = load_augmentation(pipeline(tmp_path, f"flip_slices: {share}"))
    volume, labels = picture(1, 20, 24, 4).transpose(2, 0, 1)[..., None], np.zeros((4, 20, 24), np.uint8)
    labels[0] = 1
    turned = set()
    for seed in range(20):
        views, moved = augmentation(volume, labels, seed, views=2)
        assert moved is not None
        reverse = bool(moved[-1].all())
        turned.add(int(reverse))
        assert np.array_equal(moved, labels[::-1] if reverse else labels)
        assert all(np.array_equal(view, volume[::-1] if reverse else volume) for view in views)
    assert turned == seen


def test_slices_are_not_flipped_where_images_are_slices_and_both_cures_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"flip_slices is for volumes .*leave it out, or take VerticalFlip"):
        load_augmentation("volumes").try_on(picture(1))
    for cure in ("geometric: []", "geometric: [{VerticalFlip: {p: 0.5}}]"):
        load_augmentation(pipeline(tmp_path, cure)).try_on(picture(1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flip_slices: 2", "flip_slices is a probability from 0 to 1, such as 0.5, not 2"),
        ("flip_slices: true", "not True"),
        (
            "geometric: [{HorizontalFlop: {p: 1}}]",
            "mine.yaml, geometric: albumentations has no HorizontalFlop; did you mean 'HorizontalFlip'",
        ),
        ("geometric: [{Affine: {scael: 2}}]", "mine.yaml, geometric: Affine: .*scael"),
        ("geometric: [{HorizontalFlip: {prob: 1}}]", "mine.yaml, geometric: HorizontalFlip: .*prob"),
        ("geometric: [{Affine: {scale: big}}]", "mine.yaml, geometric: Affine: .*scale"),
        ("appearance: [{OneOf: {transforms: [{GaussNoise: {var_limit: 3}}]}}]", "GaussNoise: .*var_limit"),
        ("appearance: [HorizontalFlip]", "HorizontalFlip belongs under geometric"),
        ("geometric: [GaussNoise]", "GaussNoise belongs under appearance"),
        ("geometrical: [HorizontalFlip]", "named geometric and appearance"),
        ("- HorizontalFlip", "named geometric and appearance"),
        ("geometric: [{A: 1, B: 2}]", "expected 'Name"),
        ("geometric: [", "is no YAML"),
    ],
)
def test_bad_pipelines_are_refused_by_file_transform_and_argument(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_augmentation(pipeline(tmp_path, text))


def test_unknown_pipelines_are_refused_with_the_nearest() -> None:
    with pytest.raises(DataError, match=r"data.augment=flip: did you mean 'flips'"):
        load_augmentation("flip")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("geometric: [{RandomCrop: {height: 8, width: 8}}]", "RandomCrop turns"),
        ("appearance: [{ToGray: {num_output_channels: 1}}]", "ToGray turns"),
        ("appearance: [{OneOf: {transforms: [{CLAHE: {}}, {ISONoise: {}}]}}]", "fails on images of 5 channels"),
    ],
)
def test_transforms_that_do_not_fit_the_images_are_found_before_training(
    tmp_path: Path, text: str, message: str
) -> None:
    channels = 5 if "5 channels" in message else 3
    with pytest.raises(DataError, match=message):
        load_augmentation(pipeline(tmp_path, text)).try_on(picture(1, 20, 24, 8)[..., :channels])

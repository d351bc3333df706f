"""Regions over label ids."""

import pytest
import torch

from fedseg.datamodules import DataError, Regions


def test_nested_regions_are_one_channel_each_without_background() -> None:
    labels = torch.tensor([[[0, 1, 2], [2, 3, 0]]], dtype=torch.uint8)
    regions = Regions({"disc": (1, 2), "cup": (2,)})
    expected = torch.tensor([[[[0, 1, 1], [1, 0, 0]], [[0, 0, 1], [1, 0, 0]]]], dtype=torch.float32)
    assert torch.equal(regions.encode(labels), expected)
    assert regions.encode(labels).dtype == torch.float32
    assert (regions.names, regions.channels, regions.activation) == (("disc", "cup"), 2, "sigmoid")


def test_softmax_has_one_more_output_for_the_background() -> None:
    regions = Regions({"rv": (1,), "lv": (3,)}, exclusive=True)
    assert (regions.channels, regions.activation) == (3, "softmax")
    assert regions.encode(torch.zeros(2, 4, 4, dtype=torch.uint8)).shape == (2, 2, 4, 4)


@pytest.mark.parametrize(
    ("labels", "exclusive", "message"),
    [
        ({}, False, "empty"),
        ({"disc": ()}, False, "data.regions.disc is empty"),
        ({"disc": (0, 1)}, False, "label 0"),
        ({"disc": (1, 1)}, False, "twice"),
        ({"disc": (300,)}, False, "1 to 255"),
        ({"disc": (1, 2), "cup": (2,)}, True, "share label 2"),
    ],
)
def test_bad_regions_are_refused(labels: dict[str, tuple[int, ...]], exclusive: bool, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Regions(labels, exclusive)

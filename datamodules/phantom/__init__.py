"""Synthetic sites with a dial for each way in which real sites differ."""

from fedseg.datamodules.phantom.data import PhantomDataModule

__all__ = ["PhantomDataModule"]

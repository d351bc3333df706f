"""Synthetic sites with a dial for each way in which real sites differ."""

from datamodules.phantom.data import PhantomDataModule

__all__ = ["PhantomDataModule"]

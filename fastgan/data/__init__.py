"""Real data: :func:`open_dataset` and what it gives."""

from __future__ import annotations

from fastgan.data.dataset import Dataset, Feed
from fastgan.data.resident import ResidentFeed
from fastgan.data.sources import open_dataset
from fastgan.data.toys import Modes

__all__ = ["Dataset", "Feed", "Modes", "ResidentFeed", "open_dataset"]

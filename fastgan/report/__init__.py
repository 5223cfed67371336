"""Results as pages that need nothing else, and as pictures."""

from fastgan.report.bench import bench_page, bench_pictures
from fastgan.report.profile import profile_page, profile_pictures

__all__ = ["bench_page", "bench_pictures", "profile_page", "profile_pictures"]

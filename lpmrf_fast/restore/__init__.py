"""The batch job: find photos, decode, restore, encode, resume, report. Files live here and nowhere else.

`restore_files` is what `lpmrf-fast restore` calls: sources in, a folder of restored photos with a manifest out.
"""

from .decode import DEFAULT_MAX_PIXELS
from .job import Failure, JobError, Report, restore_files
from .photo import PhotoError

__all__ = ["DEFAULT_MAX_PIXELS", "Failure", "JobError", "PhotoError", "Report", "restore_files"]

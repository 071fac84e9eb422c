"""All handlers of the mount."""

from __future__ import annotations

from fusefs.attributes import AttributeHandlers
from fusefs.contents import ContentHandlers
from fusefs.directories import DirectoryHandlers


class Operations(AttributeHandlers, DirectoryHandlers, ContentHandlers):
    """What is handed to `pyfuse3.init`. Not here, and so ENOSYS: poll (the kernel's default does), and what pyfuse3 does not know
    (fallocate, lseek, ioctl, copy_file_range and locks: the kernel emulates the last two)."""

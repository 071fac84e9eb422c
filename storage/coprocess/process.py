"""One coprocess, from its start to its end, as the process that has started it sees it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import deque

from storage.coprocess.wire import MOST

#: See there.
_PROGRAM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__main__.py")
#: What it gets of the environment: what its interpreter, the memory allocator and messages need. Passphrases and credentials are none of
#: its business.
_ENVIRONMENT = ("PATH", "LANG", "LC_", "LD_LIBRARY_PATH", "TZ", "GLIBC_TUNABLES", "MALLOC_")
#: The most that is told of what it said when it ended.
_LAST_WORDS = 300


class Process:
    """Has been started, and may be there."""

    def __init__(self, name: str, memory: tuple[int, int]) -> None:
        """`name`: what ps(1) shows. `memory`: descriptor and size of the arena's memory file. OSError, ValueError: it cannot be started."""
        self.ready = False
        #: Channels on which nobody asks now.
        self.idle: deque[socket.socket] = deque()
        self._errors = os.memfd_create("fusefs-errors", os.MFD_CLOEXEC)
        try:
            self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self.control.settimeout(None)
            try:
                with theirs:
                    self.popen = self._started(name, theirs.fileno(), memory)
            except BaseException:
                self.control.close()
                raise
        except BaseException:
            os.close(self._errors)
            raise

    def _started(self, name: str, control: int, memory: tuple[int, int]) -> subprocess.Popen[bytes]:
        # The very modules this process has, wherever it was started, and whatever is in the directory it was started in.
        paths = [path for path in sys.path if os.path.isabs(path)]
        start = "\0".join([str(memory[1]), str(os.getpid()), *paths])
        socket.send_fds(self.control, [os.fsencode(start)], [memory[0]])
        return subprocess.Popen(
            [sys.executable, "-I", _PROGRAM, name],
            stdin=control,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            # Signals from a terminal are for this process; and it keeps no disk from being unmounted.
            start_new_session=True,
            cwd="/",
            env={name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)},
        )

    def look(self) -> bool:
        """Has it said that it is there? OSError: it has ended."""
        if not self.ready:
            try:
                said = self.control.recv(MOST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            if not said:
                raise OSError("it ended before it was there")
            self.ready = True
        return True

    def new_channel(self) -> socket.socket:
        """OSError. Not while it is closed."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                socket.send_fds(self.control, [b"c"], [theirs.fileno()])
        except BaseException:
            ours.close()
            raise
        # Whatever this program's default is: SO_RCVTIMEO is what counts.
        ours.settimeout(None)
        return ours

    def close(self) -> None:
        """It ends, whatever it is doing. From any thread, more than once."""
        while self.idle:
            try:
                self.idle.pop().close()
            except IndexError:
                break  # another thread took it
        self.control.close()
        try:
            self.popen.kill()
        except PermissionError:
            # This process is another user's by now; the other ends by itself, since its channels are closed.
            return

    def ended(self, seconds: float = 0.0) -> bool:
        """Is it gone, within so many seconds? While a disk hangs it may stay for longer."""
        try:
            self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_words(self) -> str:
        """What it said last; "" if nothing."""
        said = os.pread(self._errors, os.fstat(self._errors).st_size, 0).decode(errors="replace").strip()
        return said.rpartition("\n")[2][-_LAST_WORDS:]

    def __del__(self) -> None:
        if hasattr(self, "popen"):
            os.close(self._errors)

    def forget(self) -> None:
        """In a forked child: it is the parent's."""
        for channel in (*self.idle, self.control):
            channel.close()
        # Not this process's child: nobody is to wait for it.
        self.popen.returncode = 0

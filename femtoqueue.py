# SPDX-License-Identifier: MIT
"""A durable task queue in one file and one directory, for many threads, processes and crashes.

    from femtoqueue import FemtoQueue

    q = FemtoQueue("my_queue", node_id="worker-1")
    q.push(b"hello")
    while task := q.pop():
        print(task.data)
        q.done(task)

A task is one file that holds exactly its payload. Its state is the directory it lies in, and every
change of state is one atomic rename, so a crash leaves a task either here or there, never in between:

                 schedule                  push
                    |                       |
                    v          due          v      pop                        done
                scheduled -------------> pending -------> in_progress -------------> done
                    ^                       ^                | | | |         fail
                    |   retry with a delay  |  retry, crash, | | | +---------------> failed
                    +-----------------------|----------------+ | |    bad checksum
                                            |  lease expired   | +-----------------> corrupt
                                            +------------------+

    data_dir/
      creating/<owner>~<id>                     being written, not seen by others; no .<crc32> yet
      pending/<bucket>/<id>[~n]                 waiting; n = deliveries already used up
      scheduled/<bucket>/<id>~n~<due_us>        waiting for the wall clock
      in_progress/<owner>/<id>~n~<deadline_us>  claimed, until the deadline (the lease) at least
      done/<id>   failed/<id>   corrupt/<id>
      clock-<boot>                              the queue clock of one boot of one machine

Names have one grammar:

    id      <time_us>_<node_id>_<nonce>.<crc32>   16 digits, producer, unique token, 8 hex digits
    bucket  16 digits; nothing in that directory is older
    owner   <node_id>~<pid>~<start>~<place>~<token>   one FemtoQueue object in one process

Ids sort in queue order and never change. Any regular file that is renamed into pending/ under a name
of 16 digits, "_" and no "~" is a task as well: so a shell script pushes. Everything else that lies
about is left alone, and links are never followed.

Order is by the queue clock: microseconds that never go backwards on one machine, shared by all of its
processes, and continued above the newest task after a reboot. Due times are wall-clock times.

A worker that dies has its tasks given to another: at once if its process is gone (judged by PID,
start time, boot and PID namespace), and in any case when the lease of `timeout_stale_ms` runs out. A
task is never taken from a live worker within its lease.

Delivery is at least once: a worker can die between its work and its `done`. Exactly-once effects need
handlers that may run twice. Order between machines is as good as their clocks agree.

`FemtoQueue.run(handler)` is the loop of a worker that stays. `python femtoqueue.py DIR COMMAND` offers
the same to a shell; `-h` tells how. What goes on unasked is logged to the logger "femtoqueue".
"""

from __future__ import annotations

import _thread
import errno
import itertools
import os
import stat
import sys
import time
import weakref
import zlib

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing costs more to import than all the rest
    import argparse
    import datetime
    import threading
    import types
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import Any, TypeVar

    T = TypeVar("T")

__all__ = ["FemtoQueue", "FemtoQueueError", "FemtoTask", "NotInProgress", "STATES"]
__version__ = "1.0.0"

STATES = ("scheduled", "pending", "in_progress", "done", "failed", "corrupt")
_BUCKETED = ("scheduled", "pending")
_UNFINISHED = ("scheduled", "pending", "in_progress")
_FINISHED = ("done", "failed", "corrupt")

_MAX_US = 10**16  # times have 16 digits
_MAX_ATTEMPT = 10**9 - 1  # and attempts no more than 9
_FORBIDDEN = set('/~<>:"\\|?*' if os.name == "nt" else "/~")  # in ids and node_ids
_MAX_ID = 216  # bytes: the name of a claim, "~n~deadline" behind the id, must fit into NAME_MAX, 255
_BUCKET_US = 10**9  # the period of a shared bucket of pending/
_CLOSE_US = 10**7  # the shortest period in scheduled/
_BUCKET_TASKS = 1_000
_BATCH = 1_000  # due, or abandoned, tasks that one look moves
_LOOK_US = 1_000_000  # between looks for due and abandoned tasks, while there is other work
_SWEEP_US = 60_000_000  # between sweeps
_LINGER_US = 2_000_000  # how long an empty directory is kept that somebody may be about to use
_ORPHAN_US = 86_400_000_000  # how long the remains of an owner are kept who cannot be judged
_POLL_S = 0.009  # how long a call that waits sleeps at a time
_ROUNDS = 4  # how often a call tries again; each needs another worker to have come in between
_CHUNK = 1 << 20  # a larger payload is not kept in memory
_SMALL = 4_096  # read at once; a larger buffer costs a page fault, asking for the size a system call
_FULL = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)  # not about the file that is named
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
# A FIFO or a link that carries a task's name must neither block the reader nor lead it elsewhere.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)
_READ_FLAGS = os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
# The first bytes of a payload that version 0.3 or 0.4 of the original femtoqueue wrote; MD5 follows.
_LEGACY_MAGIC = b"\x01" + bytes(7)
_LEGACY_HEADER = len(_LEGACY_MAGIC) + 16
_LEGACY_NAME = "_<built-in method hex of bytes object at 0x"  # in its file names: it left out the ()
_LAST_CLOCK_US = 7_258_118_400_000_000  # the year 2200: a stray name must not drag the clock along


class FemtoQueueError(Exception):
    """Base class of the errors that are femtoqueue's own."""


class NotInProgress(FemtoQueueError):
    """The task is not this claim's any more: finished already, or its lease ran out and was taken."""


class FemtoTask:
    """One delivery of a task, as `FemtoQueue.pop` returns it.

    It can be pickled, and finished through another FemtoQueue object on the same directory.

    id         What `push` or `schedule` returned.
    attempt    Which delivery this is; 1 is the first.
    path       The claimed file, for streaming. Valid until the task is finished or touched.
    lost       Set while `FemtoQueue.run` handles this task and its lease was lost all the same.
    """

    lost: bool = False
    _payload_start = 0  # in the file
    _claimed_from = ""  # the directory it was claimed from
    # Of a call that raised: its name, where the file goes, which directories to sync.
    _half_done: tuple[str, str | None, tuple[str, ...]] | None = None
    _moved = False  # out of in_progress/
    _finished = False  # moved, and synced if that was asked for
    _copied = False  # somebody else may finish it

    def __init__(self, id: str, data: bytes | None, attempt: int = 1, path: str = "") -> None:
        self.id: str = id
        self.attempt: int = attempt
        self.path: str = path
        self._data = data
        self._forks = _forks

    @property
    def data(self) -> bytes:
        """The payload.

        One over 1 MiB is read from `path` each time it is asked for, and gone with the claim: then
        FileNotFoundError is raised.
        """
        if self._data is not None:
            return self._data
        for _ in range(_ROUNDS):
            try:
                with open(self.path, "rb") as file:
                    file.seek(self._payload_start)
                    return file.read()
            except FileNotFoundError:  # renamed: its lease was renewed, perhaps through another copy
                directory = os.path.dirname(self.path)
                self.path = _find_claim(directory, self.id, self.attempt) or self.path
        raise _not_found(self.path)

    def __getstate__(self) -> dict[str, object]:
        self._copied = True
        return vars(self)

    def __repr__(self) -> str:
        return f"FemtoTask(id={self.id!r}, attempt={self.attempt})"


class FemtoQueue:
    """A queue in a directory. All objects on one directory, in whatever process, are one queue.

    data_dir   Where the queue lies, on one filesystem; made if it does not exist. A directory of
               version 0.3 or 0.4 of the original femtoqueue is taken over when it is first opened.
    node_id    Stable name of this worker's place, such as the host name. It belongs to one machine or
               container at a time: tasks that it claimed elsewhere are taken back at the first `pop`.
               Several processes of one machine may share it. At most 64 bytes, without "/" and "~".
    timeout_stale_ms
               The lease, in milliseconds: a claimed task that was neither finished nor touched for so
               long is given to another worker. Until then it is safe as long as its process lives.
    sync_after_write
               Survive power cuts: what returned is on disk, with every directory entry to it.
    max_attempts
               After so many deliveries a task that comes back goes to failed/. None: no limit.
    keep_done, keep_failed
               Keep finished tasks in done/ and failed/, or delete them.
    maxsize    `push` raises `queue.Full` when so many tasks are pending. 0: no limit. The limit is
               exact for one producer that is alone. Several may exceed it, each by half of the room
               that it last saw; so may tasks that come due or back in another process.

    Bad arguments raise TypeError or ValueError, before anything is written. Any call may raise OSError;
    the same call can then be made again.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        node_id: str,
        timeout_stale_ms: float = 30_000,
        sync_after_write: bool = False,
        *,
        max_attempts: int | None = None,
        keep_done: bool = True,
        keep_failed: bool = True,
        maxsize: int = 0,
    ) -> None:
        root = _path("data_dir", data_dir)
        if not root or "\0" in root:
            raise ValueError(f"data_dir: {root!r} is no path; name a directory")
        _check_node_id(node_id)
        _check_number("timeout_stale_ms", timeout_stale_ms, 1e-3, 1e12, "milliseconds")
        if max_attempts is not None:
            _check_int("max_attempts", max_attempts, 1, "at least 1, or None for no limit")
        _check_int("maxsize", maxsize, 0, "at least 0, where 0 is no limit")
        _check_flag("sync_after_write", sync_after_write)
        _check_flag("keep_done", keep_done)
        _check_flag("keep_failed", keep_failed)

        self.data_dir: str | os.PathLike[str] = data_dir
        self.node_id: str = node_id
        self.timeout_stale_ms: float = timeout_stale_ms
        self.sync_after_write: bool = bool(sync_after_write)
        self.max_attempts: int | None = max_attempts
        self.keep_done: bool = bool(keep_done)
        self.keep_failed: bool = bool(keep_failed)
        self.maxsize: int = maxsize

        self._root = os.path.abspath(root)  # the program may change its directory
        self._lease_us = int(timeout_stale_ms * 1_000)
        self._dirs = {state: f"{self._root}/{state}" for state in (*STATES, "creating")}
        self._closed = False
        self._all_given_back = False
        self._become_new_owner()
        self._make_directories()
        self._clock = self._open_clock()
        if self.sync_after_write:
            # Whoever made them need not have been durable.
            _sync_directories(os.path.dirname(self._root), self._root)
        weakref.finalize(self, _look_soon, self._root).atexit = False

    def _become_new_owner(self) -> None:
        """Set up all that must not be shared with the process that this one was forked from."""
        me = _identity()
        self._owner = (
            f"{self.node_id}~{me.pid}~{me.start}~{me.place}~{_interpreter}{os.urandom(4).hex()}"
        )
        self._own_dir = f"{self._dirs['in_progress']}/{self._owner}"
        self._creating = f"{self._dirs['creating']}/{self._owner}~"
        self._producer = f"{self.node_id}_{os.urandom(6).hex()}"
        self._count = itertools.count()
        self._buckets: dict[tuple[str, bool], _Bucket] = {}  # where the next task goes
        self._room = 0  # how many tasks may come before maxsize is looked at again
        self._listing: _Listing | None = None
        self._misses = 0  # rises when another worker was quicker, falls with each claim
        self._has_company = False  # of other processes that claim tasks
        self._has_hosts = False  # other machines or containers among them
        # Claims that may exist though pop() did not return them: an error came, or an answer was lost.
        self._unsure: set[str] = set()
        # Paths that could not be read or moved, lately. A set that lies here is not changed any more.
        self._passed_over: set[str] = set()
        self._claimed_at_us = 0
        self._next_look_us = 0
        self._next_sweep_us = 0
        self._next_complaint_us = 0
        self._own_dir_lock = _thread.RLock()
        self._own_dirs_made = 0
        self._own_dir_is_ready = False  # made, and if that was asked for, for good
        self._unsynced: dict[str, None] = {}  # directories of renames not synced, the old side first
        self._unconfirmed: dict[tuple[str, str], tuple[str, ...]] = {}  # the same, by call and id
        self._sync_lock = _thread.RLock()
        self._generation = _generation
        _owners[self._owner] = self

    def _make_directories(self) -> None:
        made = _make_directory(self._root)
        if self.sync_after_write:
            _sync_directories(*map(os.path.dirname, made))
        for state, directory in self._dirs.items():
            if state != "in_progress":
                _make_directory(directory)
        if not os.path.isdir(self._dirs["in_progress"]):
            self._adopt_original()
            # Last: as long as it is missing, whoever opens the directory adopts again.
            _make_directory(self._dirs["in_progress"])

    def _adopt_original(self) -> None:
        """Take over a directory of the original femtoqueue 0.3 or 0.4, tasks in progress included.

        There, a worker's tasks lie in `<node_id>/` beside `pending/`. Only a time in the future tells
        a scheduled one, in `scheduled/` (0.4) or in `pending/` (0.3).
        """
        pending, scheduled = touched = [self._dirs["pending"], self._dirs["scheduled"]]
        now_us = _wall_us()
        for entry in _list(self._root):
            if entry.name in (*self._dirs, "lost+found") or not entry.is_dir(follow_symlinks=False):
                continue
            try:
                tasks = [task for task in _list(entry.path) if _is_original(task)]
            except FileNotFoundError:
                continue  # another process is doing the same
            for task in tasks:
                _rename(task.path, f"{pending}/{task.name}")
            if tasks:
                touched.insert(0, entry.path)
                _remove_directory(entry.path)
        for directory in (pending, scheduled):
            for task in _list(directory):
                if _is_original(task):
                    time_text, _, rest = task.name.partition("_")
                    later = directory == scheduled or int(time_text) > now_us
                    name = f"{max(0, int(time_text)):016d}_{rest}"
                    _rename(task.path, f"{scheduled if later else pending}/{name}")
        if self.sync_after_write:
            _sync_directories(*touched)

    def _open_clock(self) -> _Clock:
        """Find the offset that this boot's first process chose, or choose it."""
        path = f"{self._root}/clock-{_identity().boot}"
        offset_us = _read_offset(path)
        if offset_us is None:
            offset_us = max(_wall_us(), self._newest_us() + 1) - _monotonic_us()
            try:
                offset_us = self._share_offset(path, offset_us)
            except OSError as error:
                # Whoever may only look needs no clock that others share.
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
        return _clocks.setdefault((self._root, offset_us), _Clock(offset_us))

    def _share_offset(self, path: str, offset_us: int) -> int:
        """Offer it to the other processes of this boot; return theirs if one was first."""
        draft = self._creating + "%016d" % _wall_us()
        self._write(draft, (f"{offset_us}\n".encode(),))
        try:
            os.link(draft, path)  # whole at once like a rename, but the first one wins
        except OSError:
            first_us = _read_offset(path)
            if first_us is not None:
                return first_us
            _rename(draft, path)  # over a broken one, or on a filesystem without hard links
        finally:
            _try(_unlink, draft)
        return offset_us

    def _newest_us(self) -> int:
        """The newest time in pending/ and in_progress/, above which the clock must start."""
        times = [0]
        errors: list[OSError] = []
        wall_us = _wall_us()
        for entry in _list(self._dirs["pending"]):
            times.append(_time_of(entry.name))
            # A bucket's tasks are of one period: an older one cannot be ahead of the wall clock.
            if _is_bucket(entry) and int(entry.name) + _BUCKET_US > wall_us:
                times += map(_time_of, _names(entry.path, errors))
        for name, directory in self._files("in_progress", errors=errors):
            times.append(_time_of(name))
            # A deadline set when the wall clock was ahead would come too late. The clock need not start
            # above that, only above when the lease began, which is the file's change time.
            if (claim := _parse(name)) and (info := _lstat(f"{directory}/{name}")):
                times.append(min(info.st_ctime_ns // 1_000, claim[2]))
        _raise_unless_permission(errors)
        return max(time_us for time_us in times if time_us < _LAST_CLOCK_US)

    def __repr__(self) -> str:
        return f"FemtoQueue({self._root!r}, node_id={self.node_id!r})"

    def __getstate__(self) -> dict[str, object]:
        # In another process it is another owner: only what it was made with goes along.
        names = ("node_id", "timeout_stale_ms", "sync_after_write")
        options = ("max_attempts", "keep_done", "keep_failed", "maxsize")
        return {"data_dir": self._root, **{name: getattr(self, name) for name in names + options}}

    def __setstate__(self, arguments: dict[str, object]) -> None:
        self.__init__(**arguments)  # type: ignore[misc]

    # --- in: push, schedule -----------------------------------------------------------------------

    def push(self, data: bytes | bytearray | memoryview) -> str:
        """Add a task at the end of the queue; return its id, which stays whatever becomes of the task.

        Raises TypeError if `data` is not bytes-like (encode a str yourself), and `queue.Full` if
        `maxsize` tasks are pending.
        """
        return self._add((_as_bytes(data),))

    def push_many(self, items: Iterable[bytes | bytearray | memoryview]) -> list[str]:
        """Push all `items`, in order, and return their ids.

        With `sync_after_write` the whole batch becomes durable together, at a fraction of the price.
        If this raises, such as TypeError for an item or `queue.Full`, those that were pushed are the
        first ones of `items`, perhaps none.
        """
        if isinstance(items, (bytes, bytearray, memoryview, str)):
            raise TypeError("items: expected several payloads, got one; use push()")
        if not hasattr(items, "__iter__"):
            raise TypeError(f"items: expected an iterable, got {type(items).__name__}")
        self._check_open()
        if not self.sync_after_write:
            return [self.push(item) for item in items]
        drafts: list[tuple[str, int, str]] = []  # path, time, id
        added: list[str] = []
        touched: set[str] = set()
        try:
            self._write_many(items, drafts)
            for path, time_us, id in drafts:
                bucket = self._put_into_bucket(path, "pending", time_us, id)
                if bucket is None:
                    raise _not_found(path)
                added.append(f"{bucket.path}/{id}")
                touched.update(bucket.to_sync())
            _sync_directories(*touched)
        except BaseException as error:
            for path in (*reversed(added), *(path for path, _, _ in drafts)):
                _try(_unlink, path)
            _add_path(error, self._dirs["creating"])
            raise
        return [id for _, _, id in drafts]

    def _write_many(self, items: Iterable[object], drafts: list[tuple[str, int, str]]) -> None:
        """Write a new file for each item, for good, and note each in `drafts` beforehand."""
        unsynced: list[int] = []
        try:
            for item in items:
                if self.maxsize:
                    self._take_room(len(drafts))
                data = _as_bytes(item)
                time_us = self._clock.stamp()
                stem = self._new_stem(time_us)
                path = self._creating + stem
                drafts.append((path, time_us, f"{stem}.{zlib.crc32(data):08x}"))
                unsynced.append(os.open(path, _WRITE_FLAGS, 0o666))
                _write_all(unsynced[-1], data)
                if len(unsynced) == 100:
                    _sync_files(unsynced)
            _sync_files(unsynced)
        finally:
            for descriptor in unsynced:
                _try(os.close, descriptor)

    def push_file(self, path: str | os.PathLike[str], *, move: bool = False) -> str:
        """Push the content, of any size, of a regular file that nobody writes to any more.

        `move` takes the file itself: it is renamed where it lies on the same filesystem as the queue,
        copied and then deleted elsewhere. Until this returns, it is where it was, or it is a task.
        Raises ValueError if `path` is not a regular file, and `queue.Full` like `push`.
        """
        self._check_open()
        source = _path("path", path)
        try:
            if move and (id := self._push_by_rename(source)):
                return id
            descriptor = _open_regular(source, _READ_FLAGS & ~_NO_FOLLOW)
            try:
                id = self._add(_chunks(descriptor))
            finally:
                _try(os.close, descriptor)
        except OSError as error:
            _add_path(error, source)
            raise
        if move:
            try:
                _unlink(source)
            except BaseException:
                if _exists(source):
                    self.cancel(id)  # or there would be both the task and the file
                raise
        return id

    def _push_by_rename(self, source: str) -> str | None:
        """Make the file itself a task; None if it lies on another filesystem."""
        if self.maxsize:
            self._take_room()
        if os.path.islink(source):
            raise ValueError(f"path: {source!r} is a symbolic link; move the file that it points to")
        # Windows only syncs what is open for writing, and renames nothing that is open.
        descriptor = _open_regular(source, _READ_FLAGS | (os.O_RDWR if os.name == "nt" else 0))
        try:
            crc = _crc(descriptor)
            if self.sync_after_write:
                os.fsync(descriptor)
        finally:
            _try(os.close, descriptor)
        time_us = self._clock.stamp()
        id = f"{self._new_stem(time_us)}.{crc:08x}"
        try:
            self._publish(source, "pending", time_us, id, os.path.dirname(os.path.abspath(source)))
        except OSError as error:
            if error.errno == errno.EXDEV:
                return None
            raise
        return id

    def schedule(self, data: bytes | bytearray | memoryview, time_us: int | datetime.datetime) -> str:
        """Add a task that becomes pending at a wall-clock time, behind all that is pending then.

        `time_us` is in microseconds since the epoch, such as `time.time_ns() // 1000 + 60_000_000`, or
        an aware datetime. A time in the past is due at once. Raises ValueError for a naive datetime,
        and for a number that can only be seconds, milliseconds or nanoseconds.
        """
        return self._add((_as_bytes(data),), _as_due_us(time_us))

    def _add(self, chunks: Iterable[bytes], due_us: int | None = None) -> str:
        """Write a task and publish it: as pending, or as scheduled if it has a due time."""
        self._check_open()
        if self.maxsize and due_us is None:
            self._take_room()
        time_us = self._clock.stamp()
        if due_us is not None:
            # The id is in queue time. Once the wall clock was set, that differs; in whole milliseconds,
            # so that the noise between two clock readings does not shuffle tasks that are due together.
            time_us = max(time_us, due_us + round(time_us - _wall_us(), -3))
        stem = self._new_stem(time_us)
        draft = self._creating + stem
        try:
            id = "%s.%08x" % (stem, self._write(draft, chunks))
            if due_us is None:
                self._publish(draft, "pending", time_us, id)
            else:
                self._publish(draft, "scheduled", due_us, _format(id, 0, due_us))
        except BaseException:
            _try(_unlink, draft)
            raise
        return id

    def _new_stem(self, time_us: int) -> str:
        """An id but for its checksum."""
        return "%016d_%s%06x" % (time_us, self._producer, next(self._count))

    def _write(self, path: str, chunks: Iterable[bytes]) -> int:
        """Write a new file, for good; return its CRC-32."""
        descriptor = os.open(path, _WRITE_FLAGS, 0o666)
        try:
            try:
                crc = 0
                for chunk in chunks:
                    crc = zlib.crc32(chunk, crc)
                    _write_all(descriptor, chunk)
                if self.sync_after_write:
                    os.fsync(descriptor)
            except BaseException:
                _try(os.close, descriptor)
                raise
            os.close(descriptor)  # where a network filesystem reports a failed write
        except BaseException as error:
            _try(_unlink, path)
            _add_path(error, path)
            raise
        return crc

    def _publish(self, draft: str, state: str, time_us: int, name: str, *also: str) -> None:
        """Make a whole file a task, for good; if that fails, it is none. `also` is synced with it."""
        bucket = self._put_into_bucket(draft, state, time_us, name)
        if bucket is None:
            raise _not_found(draft)
        if self.sync_after_write:
            try:
                _sync_directories(*also, *bucket.to_sync())
            except BaseException:
                # Withdrawn, unless a worker has it already. A file to be moved is where it was.
                _try(_rename, f"{bucket.path}/{name}", draft)
                raise

    def _put_into_bucket(
        self, source: str, state: str, time_us: int, name: str, returning: bool = False
    ) -> _Bucket | None:
        """Rename `source` into a bucket of `state`; None if another worker took it meanwhile."""
        bucket = self._bucket_for(state, time_us, returning)
        for _ in range(_ROUNDS):
            target = f"{bucket.path}/{name}"
            try:
                if self.sync_after_write:
                    bucket.make_durable()
                if _rename(source, target):
                    return bucket
            except BaseException:
                _try(_rename, target, source)  # for what came when that was done
                raise
            if not bucket.made:
                _make_directory(bucket.path)
                bucket.made = True  # not before: another thread would take it for one that was removed
            elif not _exists(source):
                # Over NFS, a rename that was sent twice succeeds and then reports ENOENT: rename(2).
                return bucket if _exists(target) else None
            else:
                # It was empty, and removed. We do not make it again: where two hosts remove and make
                # one directory at a time, GlusterFS ends in a split brain.
                bucket = self._new_bucket(state, time_us, returning, bucket)
        raise _not_found(bucket.path)

    def _bucket_for(self, state: str, time_us: int, returning: bool = False) -> _Bucket:
        """The bucket in hand if it is for tasks of this time, or a new one.

        Tasks that are `returning` have their own, or new ones would enter the shared one anew each time
        the period changes to and fro.
        """
        bucket = self._buckets.get((state, returning))
        if bucket is None or not bucket.accepts(time_us):
            bucket = self._new_bucket(state, time_us, returning, bucket)
        bucket.used += 1
        if time_us > bucket.newest_us:
            bucket.newest_us = time_us
        return bucket

    def _new_bucket(self, state: str, time_us: int, returning: bool, last: _Bucket | None) -> _Bucket:
        """Take up the period's shared bucket; once that was used or is over, one named by this time."""
        start_us, end_us = _period(state, time_us)
        now_us = _wall_us() if state == "scheduled" else self._clock.now()
        entered = last is not None and start_us <= last.start_us < end_us
        shared = not entered and now_us < end_us  # nobody comes to one of the past any more
        if not shared:
            if last and entered and not last.shared and last.start_us <= time_us <= last.newest_us:
                # More tasks than a bucket holds can be due at one microsecond. That name is taken.
                start_us = max(0, last.start_us - 1)
            else:
                start_us = time_us
        # Durable producers leave the shared one soon: there each task costs a sync more.
        room = 1 if shared and self.sync_after_write else _BUCKET_TASKS
        bucket = _Bucket(self._dirs[state], start_us, end_us, shared, room)
        self._buckets[state, returning] = bucket
        return bucket

    def _take_room(self, unpublished: int = 0) -> None:
        """Raise queue.Full if there is no room for a task beside those still `unpublished`."""
        if self._room <= 0:
            errors: list[OSError] = []
            pending = sum(1 for name, _ in self._files("pending", errors=errors) if _parse(name))
            _raise_unless_permission(errors)
            free = self.maxsize - unpublished - pending
            if free <= 0:
                import queue

                raise queue.Full(f"{self.maxsize} tasks are pending in {self._root}")
            self._room = (free + 1) // 2
        self._room -= 1

    # --- through: pop, done, fail, retry, touch ---------------------------------------------------

    def pop(self, timeout: float | None = 0.0) -> FemtoTask | None:
        """Claim the oldest pending task, for the lease of `timeout_stale_ms`.

        Finish it with `done`, `fail` or `retry`. Due scheduled tasks, and those of dead or hung
        workers, become pending first, or within a second while there is other work. Returns None only
        after `timeout` seconds, where None waits for ever, and never while a task is pending or due.
        """
        self._check_open()
        if timeout != 0:
            _check_timeout(timeout)
        now_us = self._clock.stamp()
        listing = self._listing
        if listing and now_us < self._next_look_us and not self._passed_over:  # the usual case
            try:
                if (found := listing.next()) and (task := self._claim(*found, now_us, listing)):
                    return task
            except OSError:
                self._start_over()
        return self._wait_and_claim(timeout)

    def _wait_and_claim(self, timeout: float | None, stopped: Sequence[int] = ()) -> FemtoTask | None:
        """Look everywhere, until there is a task, time is over, or `stopped` is not empty."""
        end_s = None if timeout is None else time.monotonic() + timeout
        while not stopped:
            self._check_open()
            last = end_s is not None and time.monotonic() >= end_s
            task = self._claim_despite_errors(last)
            if task is not None or last:
                return task
            self._sleep_until_change(end_s, stopped)
        return None

    def _claim_despite_errors(self, last: bool) -> FemtoTask | None:
        """The oldest task there is, or None; OSError if there may be one that cannot be had.

        Upon an error all is tried once more, for a passing fault must not change the order. What then
        fails is passed over, so that one file that this user may not read does not stop the others. It
        is tried again when there is nothing else, and after a minute.
        """
        try:
            look = _Look(self._passed_over)
            task = self._refill_and_claim(last, look)
            if task is None and look.passed_over:
                self._start_over()
                self._passed_over = set()
                task = self._refill_and_claim(last, _Look())
            return task
        except OSError:
            self._start_over()
        self._passed_over = set()
        look = _Look(strict=False)
        task = self._refill_and_claim(last, look)
        if task is None and look.errors:
            self._start_over()
            raise look.errors.pop(0)  # out of the list, which its traceback is going to hold
        for error in look.errors:
            _log("%s; it is passed over", str(error))
        self._passed_over = look.passed_over
        return task

    def _refill_and_claim(self, last: bool, look: _Look) -> FemtoTask | None:
        """Claim the oldest task; None if there is none, although what is due was made pending.

        The `last` look, before the caller gets None, is for abandoned tasks as well.
        """
        if self._clock.now() >= self._next_look_us:
            self._refill_pending(look)
        while True:
            task = self._claim_oldest(look)
            if task is not None:
                return task
            before = len(look.passed_over)  # what is passed over makes room in a batch for others
            found = self._refill_pending(look) if last or look.errors else self._promote_due(look)
            if not found and len(look.passed_over) == before:
                return None

    def _start_over(self) -> None:
        self._listing = None
        self._next_look_us = 0

    def _sleep_until_change(self, end_s: float | None, stopped: Sequence[int]) -> None:
        """Sleep until there may be something to do; for a tenth of a second at most.

        A change of the directories' times ends it. That they are unchanged proves nothing, for a
        filesystem's time moves in steps: so in the end everything is listed again.
        """
        listing = self._listing
        before = _modified(listing.directories) if listing else []
        steady = listing is not None and bool(before) and max(before) < listing.begun_s - 0.02
        left_s = (self._next_look_us - self._clock.now()) / 1e6
        if end_s is not None:
            left_s = min(left_s, end_s - time.monotonic())
        turns = int(left_s / _POLL_S) if steady else 0
        for _ in range(max(1, min(turns, 11))):
            time.sleep(max(0.0, min(left_s, _POLL_S)))
            if stopped or not listing or _modified(listing.directories) != before:
                break

    def _claim_oldest(self, look: _Look) -> FemtoTask | None:
        """Claim the oldest task there is; None if a listing begun here has nothing to claim."""
        tried: dict[str, int] = {}
        alone = False
        listing = self._listing
        task = self._claim_first_of(listing, tried, look) if listing else None
        quiet = 0  # listings in a row with nothing new, but for what they hide
        while task is None and quiet < 3:
            before = sum(tried.values())
            # Twice there was nothing but what is stamped in the future: by a machine whose clock is
            # ahead. Take it as it is.
            horizon_us = None if quiet == 2 else self._clock.now()
            self._listing = None  # should the next one fail, this one is not gone on with
            listing = _Listing(self._dirs["pending"], horizon_us, look.passed_over)
            if not alone:
                self._listing = listing
            look.seen = 0
            task = self._claim_first_of(listing, tried, look)
            if sum(tried.values()) > before or listing.skipped:
                quiet = 0
            elif look.seen < listing.size and not alone:
                alone = True  # other threads took of it what they perhaps could not have
            elif listing.hides:
                quiet += 1
            else:
                break
        return task

    def _claim_first_of(
        self, listing: _Listing, tried: dict[str, int], look: _Look
    ) -> FemtoTask | None:
        """Claim the first task of a listing that can be had; None if there is none."""
        while True:
            path = None
            try:
                if (found := listing.next()) is None:
                    self._remove_empty(listing.empty)
                    return None
                name, directory = found
                path = f"{directory}/{name}"
                look.seen += 1
                times = tried.get(name, 0)
                # Network filesystems list what is gone. Or another worker, who claimed it and could not
                # read it, put it back: then it is tried once more, and no more, for they also lie.
                if path in look.passed_over or times > 1 or (times and not _exists(path)):
                    continue
                tried[name] = times + 1
                task = self._claim(name, directory, self._clock.stamp(), listing)
                if task is not None:
                    return task
            except OSError as error:
                target = str(error.filename2 or error.filename)
                if error.errno in _FULL and target.startswith(self._dirs["in_progress"]):
                    raise  # so it is with every task
                if not look.passes_over(path or target, error):
                    raise
                look.passed_over.add(path or target)  # even if corrupt/ or failed/ is what is full

    def _remove_empty(self, buckets: list[str]) -> None:
        """Remove those that no producer may be about to use: a shared one when its period is over."""
        for bucket in buckets:
            start_us = int(bucket[-16:])
            pending = bucket.startswith(self._dirs["pending"])
            age_us = (self._clock.now() if pending else _wall_us()) - start_us
            period_us = _BUCKET_US if pending else _CLOSE_US
            if age_us > _LINGER_US + (0 if start_us % period_us else period_us):
                # That of returned tasks has an old name from the start, so look when it was last used.
                used_s = _modified([bucket])
                if used_s and abs(time.time() - used_s[0]) * 1e6 > _LINGER_US:
                    _remove_directory(bucket)

    def _claim(self, name: str, directory: str, now_us: int, listing: _Listing) -> FemtoTask | None:
        """Make one pending task this object's; None if another was quicker, or it cannot be run."""
        parsed = _parse(name)
        if parsed is None:
            return None
        id, used, _ = parsed
        source = f"{directory}/{name}"
        attempt = min(used + 1, _MAX_ATTEMPT)
        claim = self._claim_name(id, attempt, now_us)
        path = f"{self._own_dir}/{claim}"
        try:
            if self.max_attempts is not None and used >= self.max_attempts:
                self._fail_unclaimed(source, id)
                return None
            if not self._rename_claim(source, path):
                self._unsure.add(claim)  # it may be done all the same, and the answer lost on a network
                self._note_miss(claim, listing)
                return None
            self._check_open()  # close() gives back what it sees, and this may have come after it
            if self._misses:
                self._misses -= 1
            self._claimed_at_us = now_us
            if self._unsure:
                self._unsure.discard(claim)
            task = self._read_and_check(path, id, attempt)
            if task is not None:
                task._claimed_from = directory
            return task
        except BaseException as error:
            # It was not delivered: back as it was, now, or at the next look, or after the lease.
            self._start_over()  # the listing has it no more
            self._unsure.add(claim)
            _try(_rename, path, source)
            # We were stopped for longer than the lease. Or, on Windows, another is just taking it.
            taken = (FileNotFoundError, PermissionError) if os.name == "nt" else FileNotFoundError
            if isinstance(error, taken) and not _exists(path):
                return None
            _add_path(error, path)
            raise

    def _claim_name(self, id: str, attempt: int, now_us: int) -> str:
        """The file name of a claim whose lease begins now."""
        return _format(id, attempt, now_us + self._lease_us)

    def _rename_claim(self, source: str, path: str) -> bool:
        """Rename a task into our own directory, made if it has to be; False if the task is gone."""
        made = self._own_dirs_made
        if self._own_dir_is_ready and _rename(source, path):
            return True
        # Which of the two is missing? To look for `source` would wait for those who rename beside it.
        return self._make_own_directory(made) and _rename(source, path)

    def _make_own_directory(self, made: int) -> bool:
        """Make what an idle worker removes; False if it is there, and was when `made` were made."""
        with self._own_dir_lock:  # another thread must not claim before the directory is on disk
            if self._own_dir_is_ready and os.path.isdir(self._own_dir):
                return made != self._own_dirs_made
            self._own_dir_is_ready = False
            _make_directory(self._own_dir)
            if self.sync_after_write:
                _sync_directories(self._dirs["in_progress"])
            self._own_dir_is_ready = True
            self._own_dirs_made += 1  # last: whoever sees the new number saw that it is ready
            return True

    def _note_miss(self, claim: str, listing: _Listing) -> None:
        """Another worker was quicker: skip names if that is likely to happen again."""
        self._misses = min(self._misses + 1, 4)
        if self._misses == 1:
            return  # one stale name is no contention yet
        if not self._has_company:
            for entry in _list(self._dirs["in_progress"]):
                if owner := _parse_owner(entry.name):
                    self._note_other_owner(owner)
        # Worker processes all try the same oldest name. Those skipped are found by the next listing.
        if self._has_company:
            listing.skip(1 + zlib.crc32(claim.encode()) % 4 ** (self._misses - 1))

    def _fail_unclaimed(self, path: str, id: str) -> None:
        """Give up a task that nobody claims, as `fail` would."""
        _log("%s has used up its %s attempts", id, self.max_attempts)
        if self.keep_failed:
            self._file_away(path, "failed", id)
        else:
            _unlink(path)

    def _file_away(self, path: str, state: str, id: str) -> None:
        """Rename a task into failed/ or corrupt/, which somebody may have removed."""
        target = f"{self._dirs[state]}/{id}"
        if not _rename(path, target) and _make_directory(self._dirs[state]):
            _rename(path, target)

    def _read_and_check(self, path: str, id: str, attempt: int) -> FemtoTask | None:
        """Read and check a claimed file; None if it was broken and is in corrupt/ now."""
        descriptor = os.open(path, _READ_FLAGS)
        try:
            if (attempt > 1 or self._has_hosts) and self._has_finished_twin(descriptor, id):
                _unlink(path)
                return None
            data: bytes | None = os.read(descriptor, _SMALL)
            if not data or len(data) == _SMALL:
                data = _read_more(descriptor, path, data or b"")
            crc = _crc(descriptor) if data is None else zlib.crc32(data)
            begin = 0 if id.endswith(".%08x" % crc) else _find_payload(descriptor, id)
        finally:
            os.close(descriptor)
        if begin is None:
            _log("%s does not match its checksum; it is in corrupt/", id)
            self._file_away(path, "corrupt", id)
            return None
        task = FemtoTask(id, data, attempt, path)
        if begin:
            task._payload_start = begin
            task._data = data and data[begin:]
        return task

    def _has_finished_twin(self, descriptor: int, id: str) -> bool:
        """Does the claimed file lie in done/ or failed/ as well?

        Healing a distributed filesystem can leave a renamed file under both names. To rename it onto
        its other name then succeeds and does nothing: POSIX.
        """
        info = os.fstat(descriptor)
        others = (_lstat(f"{self._dirs[state]}/{id}") for state in ("done", "failed"))
        return info.st_nlink > 1 and any(other and os.path.samestat(other, info) for other in others)

    def done(self, task: FemtoTask) -> None:
        """Finish `task`: to done/, or deleted if `keep_done` is off. It is never delivered again.

        Raises NotInProgress if the claim was lost, and ValueError for a task of another queue. After an
        OSError, the same call can be made again.
        """
        self._finish(task, "done", self.keep_done)

    def fail(self, task: FemtoTask) -> None:
        """Give `task` up: to failed/, or deleted if `keep_failed` is off. Raises like `done`."""
        self._finish(task, "failed", self.keep_failed)

    def _finish(self, task: FemtoTask, state: str, keep: bool) -> None:
        self._check_task(task)
        directory = self._dirs[state]
        if keep:
            self._leave_in_progress(task, state, f"{directory}/{task.id}", (directory,))
        else:
            self._leave_in_progress(task, state, None, ())

    def retry(self, task: FemtoTask, delay_ms: float = 0) -> None:
        """Have `task` delivered again, now at its old place or after a delay, which survives restarts.

        Once `max_attempts` deliveries are used up it fails instead. Raises like `done`.
        """
        self._check_task(task)
        _check_number("delay_ms", delay_ms, 0, 1e12, "milliseconds")
        if self.max_attempts is not None and task.attempt >= self.max_attempts:
            self.fail(task)
        else:
            self._put_back(task, int(delay_ms * 1_000))

    def _put_back(self, task: FemtoTask, delay_us: int) -> None:
        if delay_us:
            state, time_us = "scheduled", _wall_us() + delay_us
            name = _format(task.id, task.attempt, time_us)
        else:
            state, time_us = "pending", _time_of(task.id)
            name = _format(task.id, task.attempt)
        bucket = self._bucket_for(state, time_us, returning=True)
        if bucket.made and not os.path.isdir(bucket.path):  # removed, as in _put_into_bucket
            bucket = self._new_bucket(state, time_us, True, bucket)
        if self.sync_after_write:
            bucket.make_durable()
        self._leave_in_progress(
            task, f"retry after {delay_us} us", f"{bucket.path}/{name}", bucket.to_sync()
        )
        bucket.made = True
        self._forget_listings()

    def touch(self, task: FemtoTask) -> None:
        """Begin a new full lease for `task`. Raises like `done`."""
        self._check_task(task)
        claim = self._claim_name(task.id, task.attempt, self._clock.stamp())
        target = f"{os.path.dirname(task.path)}/{claim}"
        self._move_claim(task, target)
        task.path = target

    def _check_task(self, task: FemtoTask) -> None:
        self._check_open()
        if not isinstance(task, FemtoTask):
            raise TypeError(f"task: expected what pop() returned, got {type(task).__name__}")
        if task._finished:
            raise NotInProgress(f"{task.id} was finished already")
        if not task.path.startswith(self._dirs["in_progress"] + "/"):
            # The directory is mounted elsewhere there, or the task is not ours.
            try:
                task.path = self._locate(task)
            except NotInProgress:
                if _exists(task.path):
                    raise ValueError(f"task: {task.id} is of another queue, not of {self!r}") from None
                raise

    def _leave_in_progress(
        self, task: FemtoTask, verdict: str, target: str | None, directories: tuple[str, ...]
    ) -> None:
        """Take `task` out of in_progress/: to `target`, or away. Then sync the directories touched."""
        again = False
        if task._half_done and task._half_done[0] == verdict:
            # The same call raised: go on where it ended.
            again, (_, target, directories) = True, task._half_done
        try:
            if not (again and task._moved):
                self._move_claim(task, target, again)
                task._moved = True
            if self.sync_after_write:
                self._sync_unsynced()
                source = task._claimed_from or os.path.dirname(task.path)
                _sync_directories(*dict.fromkeys((source, os.path.dirname(task.path), *directories)))
            task._finished = True
        except NotInProgress:
            raise
        except BaseException:
            task._half_done = (verdict, target, directories)
            raise

    def _move_claim(self, task: FemtoTask, target: str | None, again: bool = False) -> None:
        """Rename a claim to `target`, or delete it, whatever it is called by now."""
        for _ in range(_ROUNDS):
            if _rename(task.path, target) if target else _unlink(task.path):
                return
            try:
                task.path = self._locate(task)
            except NotInProgress:
                # Was it done all the same, and only the answer wrong? Over NFS: rename(2).
                ours = (again and target) or self._is_still_ours(task)
                if ours and not task._moved and (not target or _exists(target)):
                    return
                raise
            if target and _make_directory(os.path.dirname(target)):  # somebody had removed it
                self._note_unsynced(os.path.dirname(os.path.dirname(target)))
        raise _not_found(target or task.path)

    def _sync_unsynced(self) -> None:
        """Sync both sides of the renames that were left to be synced.

        The old side first: on btrfs, a file whose new name alone is certain comes back under the old
        one as well.
        """
        with self._sync_lock:  # another thread must not return before what this one took up is on disk
            unsynced, self._unsynced = self._unsynced, {}
            try:
                _sync_directories(*unsynced)
            except BaseException:
                self._unsynced = unsynced | self._unsynced
                raise

    def _is_still_ours(self, task: FemtoTask) -> bool:
        """Is there nobody else who could have moved this claim?"""
        parsed = _parse(os.path.basename(task.path))
        lease_runs = parsed is not None and parsed[2] > self._clock.now()
        mine = os.path.dirname(task.path) == self._own_dir
        return lease_runs and mine and not task._copied and task._forks == _forks

    def _locate(self, task: FemtoTask) -> str:
        """Find the claim's file: a `touch` elsewhere renames it, another host mounts it elsewhere."""
        owner = os.path.basename(os.path.dirname(task.path))
        path = _find_claim(f"{self._dirs['in_progress']}/{owner}", task.id, task.attempt)
        if owner and path:
            return path
        if not _exists(self._dirs["in_progress"]):  # unmounted, or moved away: that tells nothing
            raise _not_found(self._dirs["in_progress"])
        raise NotInProgress(
            f"{task.id}: attempt {task.attempt} is not in progress; it was finished already, "
            "or its lease ran out (a longer timeout_stale_ms, or touch(), prevents that)"
        )

    # --- back: due tasks, dead and hung workers ---------------------------------------------------

    def _refill_pending(self, look: _Look) -> bool:
        """Bring back what is due or abandoned; tell if anything became pending."""
        now_us = self._clock.now()
        self._listing = None  # another process may have put a task back at its old place
        self._next_look_us = now_us + _LOOK_US
        if now_us >= self._next_sweep_us:
            self._next_sweep_us = now_us + _SWEEP_US
            self._passed_over = set()
            self._sweep(now_us, look)
        recovered = self._recover_abandoned(now_us, look)
        return self._promote_due(look) or recovered

    def _recover_abandoned(self, now_us: int, look: _Look) -> bool:
        """Make the tasks of owners that are gone, and of those that hang, pending; tell if any was."""
        unsure = set(self._unsure)
        owners = look.read(_list, self._dirs["in_progress"])
        if owners is None:
            return False
        self._has_company = False
        back: list[tuple[str, str]] = []
        for entry in owners:
            owner = _parse_owner(entry.name)
            if owner is None or not entry.is_dir(follow_symlinks=False):
                continue
            self._note_other_owner(owner)
            names = look.read(_names, entry.path)
            if entry.name == self._owner:
                unsure.difference_update(unsure if names is None else names)
            back += self._find_abandoned(entry, names or [], now_us, look)
        self._unsure -= unsure  # they did not come about
        return self._make_pending(sorted(back)[:_BATCH], look)

    def _find_abandoned(
        self, owner: os.DirEntry[str], names: list[str], now_us: int, look: _Look
    ) -> list[tuple[str, str]]:
        """Which claims nobody works on: the name that each has in pending/, and its path."""
        mine = owner.name == self._owner
        alive = _is_alive(owner.name, self.node_id)
        back = []
        for name in names:
            path = f"{owner.path}/{name}"
            if (parsed := _parse(name)) and path not in look.passed_over:
                id, used, deadline_us = parsed
                undelivered = mine and name in self._unsure
                if undelivered or alive is False or deadline_us < now_us:
                    back.append((_format(id, used - 1 if undelivered else used), path))
        idle = mine and now_us - self._claimed_at_us > _LINGER_US
        if not names and (idle or alive is False):
            _remove_directory(owner.path)
        return back

    def _note_other_owner(self, owner: tuple[str, int, str, str, str]) -> None:
        """Remember if there are other processes that claim tasks, and other machines."""
        _, pid, start, place, _ = owner
        me = _identity()
        self._has_company |= (pid, start, place) != (me.pid, me.start, me.place)
        self._has_hosts |= place != me.place

    def _promote_due(self, look: _Look) -> bool:
        """Make due tasks pending, earliest first; tell if there were any."""
        now_us = _wall_us()
        due, next_due_us = self._find_due(now_us, look)
        self._next_look_us = min(self._next_look_us, self._clock.now() + max(0, next_due_us - now_us))
        return self._make_pending([(name, path) for _, name, path in sorted(due)[:_BATCH]], look)

    def _find_due(self, now_us: int, look: _Look) -> tuple[list[tuple[int, str, str]], int]:
        """What is due, as (due time, name, path), and when the next one will be.

        What is found not to be due yet is sorted into closer buckets, not to be read at each look.
        """
        top = self._dirs["scheduled"]
        due: list[tuple[int, str, str]] = []
        next_due_us = _MAX_US
        moved_closer = 0
        for entry in sorted(look.read(_list, top) or [], key=lambda entry: entry.name):
            start_us = _time_of(entry.name)
            if start_us > now_us:
                next_due_us = min(next_due_us, start_us)
                break
            if len(due) >= _BATCH:
                continue  # the rest when these are gone, or at the next look
            if _is_bucket(entry):
                directory, names = entry.path, look.read(_names, entry.path)
                if not names:
                    self._remove_empty([directory])
                    continue
            else:
                directory, names = top, [entry.name] if _is_file(entry) else []
            for name in names:
                if (parsed := _parse(name)) is None:
                    continue
                id, used, due_us = parsed
                path = f"{directory}/{name}"
                if path in look.passed_over:
                    continue
                if due_us <= now_us:
                    due.append((due_us, _format(id, used), path))
                    continue
                next_due_us = min(next_due_us, due_us)
                if moved_closer < _BATCH and _period("scheduled", due_us)[0] > start_us:
                    try:
                        moved_closer += self._move_unclaimed(path, "scheduled", due_us, name, _Look())
                    except OSError:
                        moved_closer = _BATCH  # then it is read at each look, until it is due
        return due, next_due_us

    def _make_pending(self, tasks: list[tuple[str, str]], look: _Look) -> bool:
        """Move tasks, given by name and path, to their old places; tell if any was moved."""
        moved = 0
        try:
            for name, path in tasks:
                moved += self._move_unclaimed(path, "pending", _time_of(name), name, look)
        finally:
            if moved:
                self._forget_listings()
        self._sync_unsynced()
        return moved > 0

    def _move_unclaimed(self, path: str, state: str, time_us: int, name: str, look: _Look) -> bool:
        """Rename a task that nobody claims; False if it is not there any more, or cannot be moved."""
        try:
            bucket = self._put_into_bucket(path, state, time_us, name, returning=True)
        except OSError as error:
            if os.name == "nt" and isinstance(error, PermissionError):
                return False  # there, whoever works on the file keeps it from being renamed
            if not look.passes_over(path, error):
                raise
            return False
        if bucket:
            self._note_unsynced(os.path.dirname(path), *bucket.to_sync())
        return bucket is not None

    def _note_unsynced(self, *directories: str) -> None:
        if self.sync_after_write:
            with self._sync_lock:
                self._unsynced.update(dict.fromkeys(directories))

    def _forget_listings(self) -> None:
        """A task went back to its old place, which may be before all that is in hand here."""
        for queue in _objects_on(self._root):
            queue._listing = None
            queue._room = 0

    def _sweep(self, now_us: int, look: _Look) -> None:
        """Delete what dead writers left half-written, and the empty directories of forgotten owners."""
        for entry in look.read(_list, self._dirs["creating"]) or []:
            owner, _, stamp = entry.name.rpartition("~")
            begun_us = _time_of(stamp)
            if _parse_owner(owner) and begun_us and _is_file(entry):
                alive = _is_alive(owner, self.node_id)
                if alive is False or (alive is None and now_us - begun_us > _ORPHAN_US):
                    _try(_unlink, entry.path)
        for entry in look.read(_list, self._dirs["in_progress"]) or []:
            if _parse_owner(entry.name) and _is_alive(entry.name, self.node_id) is None:
                info = _lstat(entry.path)
                if info and _wall_us() - info.st_mtime_ns // 1_000 > _ORPHAN_US:
                    _remove_directory(entry.path)

    # --- looking ----------------------------------------------------------------------------------

    def status(self, id: str) -> str | None:
        """The state of a task, one of `STATES`, or None if there is no task of this id.

        True at some moment during the call; what is read may change at once.
        """
        self._check_open()
        return next((state for state, _ in self._find(id, STATES)), None)

    def counts(self) -> dict[str, int]:
        """How many tasks each state holds. Not one moment's picture: tasks move while it counts."""
        self._check_open()
        return {state: sum(1 for _ in self._walk(state)) for state in STATES}

    def ids(self, state: str) -> Iterator[str]:
        """The ids of all tasks in `state`, oldest first, or in the order in which they are due.

        Lazy where it matters: of pending/, one bucket at a time is in memory.
        """
        self._check_open()
        _check_state(state, STATES)
        return (id for id, _, _ in self._walk(state))

    def _walk(self, state: str) -> Iterator[tuple[str, int, str]]:
        """Id, due time or deadline, and directory of each task of `state`, first one first."""
        files: Iterable[tuple[str, str]] = self._files(state)
        if state == "pending":
            files = iter(_Listing(self._dirs[state]).next, None)
        elif state == "scheduled":
            dated = [(parsed[2], *file) for file in files if (parsed := _parse(file[0]))]
            files = [(name, directory) for _, name, directory in sorted(dated)]
        else:
            files = sorted(files)
        last = ""
        for name, directory in files:
            # The same name twice running: readdir of a distributed filesystem.
            if name != last and (parsed := _parse(name)):
                yield parsed[0], parsed[2], directory
            last = name

    def _files(
        self, state: str, until: str = "~", errors: list[OSError] | None = None
    ) -> Iterator[tuple[str, str]]:
        """Name and directory of each regular file, those of the youngest directory first.

        What lies under a name above `until` is passed over; "~" is above all names.
        """
        top = self._dirs[state]
        for entry in sorted(_list(top), key=lambda entry: entry.name, reverse=True):
            if entry.name > until:
                continue
            if state == "in_progress":
                inner = bool(_parse_owner(entry.name)) and entry.is_dir(follow_symlinks=False)
            else:
                inner = state in _BUCKETED and _is_bucket(entry)
            if inner:
                yield from ((name, entry.path) for name in _names(entry.path, errors))
            elif state != "in_progress" and _is_file(entry):
                yield entry.name, top

    def _find(self, id: str, states: Iterable[str]) -> Iterator[tuple[str, str]]:
        """State and path of a task, perhaps more than once: it may move while we search.

        An id may come from outside. Only one that is a task's name by our grammar becomes a path.
        """
        if not isinstance(id, str):
            raise TypeError(f"id: expected str, got {type(id).__name__}; of a task, pass task.id")
        if not _is_id(id):
            return
        for state in (*states, *states):
            if state in _FINISHED:
                path = f"{self._dirs[state]}/{id}"
                info = _lstat(path)
                if info and stat.S_ISREG(info.st_mode):
                    yield state, path
                continue
            until = f"{id}~" if state == "pending" else "~"  # buckets hold nothing older
            for name, directory in self._files(state, until):
                if name.startswith(id) and (_parse(name) or "")[:1] == (id,):
                    yield state, f"{directory}/{name}"

    # --- housekeeping -----------------------------------------------------------------------------

    def cancel(self, id: str) -> bool:
        """Drop a pending or scheduled task; False if there is none of this id to drop."""
        self._check_open()
        for _, path in self._find(id, _BUCKETED):
            if _unlink(path):
                return self._confirm("cancel", id, os.path.dirname(path))
        return self._confirm("cancel", id)

    def requeue(self, id: str) -> bool:
        """Make a failed, corrupt or done task pending again, at its old place, with no attempt used.

        False if there is none of this id. A corrupt one must have been repaired, or is corrupt again.
        """
        self._check_open()
        for _, path in self._find(id, ("failed", "corrupt", "done")):
            if bucket := self._put_into_bucket(path, "pending", _time_of(id), id, returning=True):
                self._forget_listings()
                return self._confirm("requeue", id, os.path.dirname(path), *bucket.to_sync())
        return self._confirm("requeue", id)

    def _confirm(self, call: str, id: str, *touched: str) -> bool:
        """Sync what the call touched, or touched before without confirming it; False for nothing."""
        touched += self._unconfirmed.pop((call, id), ())
        if self.sync_after_write and touched:
            try:
                _sync_directories(*touched)
            except BaseException:
                self._unconfirmed[call, id] = touched
                raise
        return bool(touched)

    def purge(self, state: str, older_than_s: float) -> int:
        """Delete the tasks of done/, failed/ or corrupt/ that were finished so many seconds ago.

        Returns how many. By the file's change time, which the filesystem sets when it is renamed.
        """
        self._check_open()
        _check_state(state, _FINISHED)
        _check_number("older_than_s", older_than_s, 0, float("inf"), "seconds")
        until_s = time.time() - older_than_s
        count = 0
        for entry in _list(self._dirs[state]):
            if _is_id(entry.name) and _is_file(entry) and (info := _lstat(entry.path)):
                # On Windows, that field is the time of creation.
                finished_s = info.st_mtime if os.name == "nt" else info.st_ctime
                if finished_s <= until_s:
                    count += _unlink(entry.path)
        if self.sync_after_write:
            # Even if there was nothing: the call before may have failed here.
            _sync_directories(self._dirs[state])
        return count

    def join(self, timeout: float | None = None) -> bool:
        """Wait until nothing is pending, in progress or scheduled; False if `timeout` seconds ran out.

        It only watches: others must be working.
        """
        self._check_open()
        _check_timeout(timeout)
        end_s = None if timeout is None else time.monotonic() + timeout
        # Twice, since a task can move back from in_progress/ behind the reader.
        unfinished = _UNFINISHED * 2
        while any(_parse(name) for state in unfinished for name, _ in self._files(state)):
            left_s = _POLL_S if end_s is None else end_s - time.monotonic()
            if left_s <= 0:
                return False
            time.sleep(min(left_s, _POLL_S))
            self._check_open()
        return True

    def close(self) -> None:
        """Give back what was claimed and not finished. Other calls raise FemtoQueueError then."""
        if self._all_given_back:
            return
        self._become_another_owner()
        self._closed = True
        # From here on it is judged dead, should this be cut short.
        _owners.pop(self._owner, None)
        look = _Look(strict=False)
        claims = [(name, claim) for name in _names(self._own_dir) if (claim := _parse(name))]
        back = [(_format(id, used), f"{self._own_dir}/{name}") for name, (id, used, _) in claims]
        self._make_pending(back, look)
        if look.errors:
            raise look.errors.pop(0)
        _remove_directory(self._own_dir)
        self._all_given_back = True

    def _check_open(self) -> None:
        """Raise if this was closed. After a fork, go on as another owner."""
        if self._closed:
            raise FemtoQueueError(f"{self!r} is closed; make a new one")
        if self._generation != _generation:
            self._become_another_owner()

    def _become_another_owner(self) -> None:
        """Claim as oneself, if this process was forked from the one that made this object."""
        with _fork_lock:  # another thread may have done it by now
            if self._generation != _generation:
                self._become_new_owner()

    def __enter__(self) -> FemtoQueue:
        self._check_open()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # --- the loop ---------------------------------------------------------------------------------

    def run(self, handler: Callable[[FemtoTask], object], *, until_empty: bool = False) -> int:
        """Hand task after task to `handler`: what a worker's main program usually is.

        When it returns, the task is done. When it raises, the exception is logged and the task comes
        back after a delay that doubles with each attempt, from a second to an hour, more or less by up
        to half, until `max_attempts` are used up. While it runs, the lease is kept alive; `task.lost`
        tells a handler that it was lost all the same, because the process was stopped for longer.

        In the main thread, SIGTERM, SIGINT and SIGHUP let the handler finish and then end the loop. A
        second one gives the task back at once, and raises SystemExit or KeyboardInterrupt.

        The handler may finish the task itself. What it returns is ignored, but a coroutine or generator
        raises TypeError: it would never run. `until_empty` ends the loop when nothing is pending or
        due, instead of waiting for more. Returns how many tasks were handled without an exception,
        and without losing the lease.

        An OSError, such as of a full disk, is raised when `until_empty` is set or a task cannot be
        finished. Otherwise it is logged, and the worker tries again each second.
        """
        if not callable(handler):
            raise TypeError(f"handler: expected a callable, got {type(handler).__name__}")
        import threading

        current: list[FemtoTask] = []
        ended = threading.Event()
        heart = threading.Thread(target=self._keep_alive, args=(current, ended), daemon=True)
        heart.start()
        count = 0
        try:
            with _StopOnSignals() as signals:
                while not signals and (task := self._next_task(until_empty, signals)):
                    current[:] = [task]
                    try:
                        count += self._handle(task, handler)
                    finally:
                        current.clear()
        finally:
            ended.set()
            heart.join()
        return count

    def _next_task(self, until_empty: bool, signals: Sequence[int]) -> FemtoTask | None:
        """What `run` handles next. A worker that stays outlives errors, and logs one a minute."""
        while True:
            try:
                return self._wait_and_claim(0.0 if until_empty else None, signals)
            except OSError as error:
                if until_empty or error.errno is None:  # such as the TimeoutError of an alarm
                    raise
                if self._clock.now() >= self._next_complaint_us:
                    self._next_complaint_us = self._clock.now() + _SWEEP_US
                    _log("no task can be had, but the worker stays: %s", str(error))
            time.sleep(1)

    def _handle(self, task: FemtoTask, handler: Callable[[FemtoTask], object]) -> bool:
        """Run the handler for one task and finish it; tell if both went well."""
        pid = os.getpid()
        try:
            try:
                result = handler(task)
            except Exception as error:
                if os.getpid() != pid:
                    raise
                of = f" of {self.max_attempts}" if self.max_attempts else ""
                _log("%s: attempt %s%s failed: %s", task.id, task.attempt, of, error, error=error)
                if not task._finished:
                    delay_ms = min(1_000 * 2 ** min(task.attempt - 1, 12), 3_600_000)
                    self.retry(task, delay_ms * (0.5 + os.urandom(1)[0] / 255))
                return False
            if os.getpid() != pid:
                raise SystemExit  # the handler forked, and here is the child: the task is not its own
            _check_has_run(result)
            if not task._finished:
                self.done(task)
            return True
        except NotInProgress:
            _log("%s: its lease was lost while it was handled", task.id)
            return False
        except BaseException:
            try:
                if not task._finished and os.getpid() == pid:
                    self._put_back(task, 0)
            except NotInProgress:
                pass  # it was finished before the exception came
            raise

    def _keep_alive(self, current: list[FemtoTask], ended: threading.Event) -> None:
        while not ended.wait(self._lease_us / 3e6):
            for task in tuple(current):
                try:
                    self.touch(task)
                except FemtoQueueError:  # NotInProgress, or closed
                    task.lost = True
                except OSError as error:
                    _log("%s: its lease could not be renewed", task.id, error=error)


# --- names --------------------------------------------------------------------------------------------


def _format(id: str, used: int, time_us: int | None = None) -> str:
    """The file name of a task that was delivered `used` times; `time_us`: its due time or deadline."""
    if time_us is not None:
        return "%s~%d~%016d" % (id, used, time_us)
    return f"{id}~{used}" if used else id


def _parse(name: str) -> tuple[str, int, int] | None:
    """Id, deliveries used up, due time or deadline; None if this is not the name of a task.

    A name without a time, as shell scripts and the original make them, is due at the time in its id.
    """
    id, tilde, rest = name.partition("~")
    stamp = id[:16]
    # isprintable: an id is one line anywhere, and a name that is not UTF-8 is no id.
    if not (stamp.isdigit() and id[16:17] == "_" and 17 < len(id) <= _MAX_ID and id.isprintable()):
        return None
    if not id.isascii() and not (stamp.isascii() and len(id.encode()) <= _MAX_ID):
        return None
    if not tilde:
        return id, 0, int(stamp)
    used, tilde, time_text = rest.partition("~")
    if not _is_digits(used) or len(used) > 9 or (tilde and not _is_digits(time_text, 16)):
        return None
    return id, int(used), int(time_text or stamp)


def _time_of(name: str) -> int:
    """The time that the name of a task or a bucket begins with; 0 for other names."""
    digits = name[:16]
    return int(digits) if _is_digits(digits, 16) else 0


def _is_digits(text: str, length: int | None = None) -> bool:
    return text.isdigit() and text.isascii() and length in (None, len(text))


def _is_id(text: str) -> bool:
    """Is this a task's id, and nothing else on any filesystem?"""
    return not _FORBIDDEN & set(text) and _parse(text) is not None


def _is_bucket(entry: os.DirEntry[str]) -> bool:
    return _is_digits(entry.name, 16) and entry.is_dir(follow_symlinks=False)


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False)


def _is_original(entry: os.DirEntry[str]) -> bool:
    """Is this a task file of the original femtoqueue?"""
    time_text, underscore, _ = entry.name.partition("_")
    if not (underscore and _is_digits(time_text.removeprefix("-")) and len(time_text) <= 16):
        return False
    if not _is_file(entry):
        return False
    if _LEGACY_NAME in entry.name:
        return True
    try:
        with open(entry.path, "rb") as file:
            return file.read(len(_LEGACY_MAGIC)) == _LEGACY_MAGIC
    except (PermissionError, FileNotFoundError):
        return False


# --- payloads -----------------------------------------------------------------------------------------


def _chunks(descriptor: int) -> Iterator[bytes]:
    while chunk := os.read(descriptor, _CHUNK):
        yield chunk


def _crc(descriptor: int) -> int:
    crc = 0
    for chunk in _chunks(descriptor):
        crc = zlib.crc32(chunk, crc)
    return crc


def _read_more(descriptor: int, path: str, data: bytes) -> bytes | None:
    """`data` and what follows it in the file; None if that is too much to be kept in memory."""
    info = os.fstat(descriptor)
    if not stat.S_ISREG(info.st_mode):
        raise OSError(errno.EINVAL, "not a regular file any more", path)
    if info.st_size > _CHUNK:
        os.lseek(descriptor, 0, os.SEEK_SET)  # for who computes the CRC-32
        return None
    return data + b"".join(_chunks(descriptor))


def _find_payload(descriptor: int, id: str) -> int | None:
    """Where the payload begins in a file whose id does not tell its CRC-32; None if it is broken.

    The original wrote a header with an MD5 digest before it. What anybody else put there is taken as
    it is.
    """
    stem, _, crc_text = id.rpartition(".")
    nonce = stem.rpartition("_")[2]
    if len(crc_text) == 8 and len(nonce) >= 18 and set(crc_text + nonce) <= set("0123456789abcdef"):
        return None  # it does tell, and another one
    os.lseek(descriptor, 0, os.SEEK_SET)
    header = os.read(descriptor, _LEGACY_HEADER)
    if header.startswith(_LEGACY_MAGIC):
        import hashlib

        digest = hashlib.md5(usedforsecurity=False)
        for chunk in _chunks(descriptor):
            digest.update(chunk)
        if header == _LEGACY_MAGIC + digest.digest():
            return _LEGACY_HEADER
    return None if _LEGACY_NAME in id else 0


# --- buckets, and how pending/ is read ----------------------------------------------------------------


class _Bucket:
    """A directory that this object puts tasks into, and what it has put there.

    Everybody begins with the bucket of the current period, and goes on to others of up to 1,000 tasks,
    so that no directory becomes large. In scheduled/ the periods are a tenth of the wait or shorter: a
    bucket that has begun soon falls due as a whole.
    """

    def __init__(self, parent: str, start_us: int, end_us: int, shared: bool, room: int) -> None:
        self.parent = parent
        self.path = "%s/%016d" % (parent, start_us)
        self.start_us = start_us
        self.end_us = end_us
        self.shared = shared  # with all producers of this period
        self.room = room
        self.used = 0
        self.newest_us = start_us
        self.made = False  # by us, or found when we tried to
        self.durable = False  # its own entry is on disk

    def accepts(self, time_us: int) -> bool:
        return self.start_us <= time_us < self.end_us and self.used < self.room

    def make_durable(self) -> None:
        """Make sure that no task is moved below a directory that a power cut would take away."""
        if not self.durable:
            _make_directory(self.path)
            _sync_directories(self.parent)
            self.made = True
            self.durable = not self.shared  # which another producer may have made just now

    def to_sync(self) -> tuple[str, ...]:
        """What to sync after a task was put here."""
        return (self.path,) if self.durable else (self.path, self.parent)


def _period(state: str, time_us: int) -> tuple[int, int]:
    """Begin and end of the time for which all producers share a bucket."""
    width = _BUCKET_US
    if state == "scheduled":
        width = max(_CLOSE_US, 10 ** (len(str(max(0, time_us - _wall_us()))) - 2))
    start_us = time_us - time_us % width
    return start_us, start_us + width


class _Look:
    """One look through the directories, and what it passes over because that cannot be read or moved.

    A strict one adds nothing to that: the first error is raised.
    """

    def __init__(self, passed_over: set[str] | None = None, strict: bool = True) -> None:
        self.passed_over = set() if passed_over is None else passed_over
        self.strict = strict
        self.errors: list[OSError] = []  # the first ones
        self.seen = 0  # how many names of the listing in hand

    def passes_over(self, path: str, error: OSError) -> bool:
        """May the look go on without what is at `path`? If so, note it."""
        if self.strict:
            return False
        if error.errno not in _FULL:
            self.passed_over.add(path)
        if len(self.errors) < 10:
            error.__context__ = None  # its frames, and those of the traceback, hold this object
            self.errors.append(error.with_traceback(None))
        return True

    def read(self, reader: Callable[[str], list[T]], directory: str) -> list[T] | None:
        """What `_list` or `_names` says of a directory; None if that is passed over."""
        if directory in self.passed_over:
            return None
        try:
            return reader(directory)
        except OSError as error:
            if not self.passes_over(directory, error):
                raise
            return None


class _Listing:
    """The names in pending/, smallest first, opening each bucket only when its turn comes.

    A listing is no snapshot: readdir may miss a name and still show a later one that was added
    meanwhile. So it hides what was stamped after the horizon; that belongs to the next one.
    """

    def __init__(
        self, directory: str, horizon_us: int | None = None, passed_over: Iterable[str] = ()
    ) -> None:
        self.begun_s = time.time()
        self.hides = False  # something stamped after the horizon
        self.skipped = False  # something was left to the next listing
        self.empty: list[str] = []  # buckets
        self.directories = [directory]  # read so far
        self.size = 0  # how many names were listed
        self._end = "~" if horizon_us is None else "%016d~" % horizon_us
        self._lock = _thread.RLock()
        # All of these in descending order, so that the next one is the last.
        self._final: list[tuple[str, str]] = []  # nothing that is not in here yet is smaller
        self._hand: list[tuple[str, str]] = []
        self._buckets: list[str] = []
        loose = []
        for entry in _list(directory):
            if _is_bucket(entry):
                if f"{directory}/{entry.name}" not in passed_over:
                    self._buckets.append(entry.name)
            elif _is_file(entry):
                loose.append(entry.name)
        self._buckets.sort(reverse=True)
        self._take_up(loose, directory)

    def next(self) -> tuple[str, str] | None:
        """Name and directory of the next one. Any thread may ask.

        A bucket that cannot be read raises OSError once; the next call goes on behind it.
        """
        while True:
            try:
                return self._final.pop()
            except IndexError:
                with self._lock:
                    if not self._final and not self._open_more():
                        return None

    def skip(self, count: int) -> None:
        """Leave so many names to the next listing."""
        self.skipped = True
        del self._final[-count:]

    def _open_more(self) -> bool:
        """Open buckets until the smallest names in hand are final; False if nothing is left."""
        while self._buckets and not (self._hand and self._hand[-1][0] < self._buckets[-1]):
            bucket = f"{self.directories[0]}/{self._buckets.pop()}"
            self.directories.append(bucket)
            self.size += 1  # so that whoever began this sees less than all, should it not be readable
            names = _names(bucket)
            self.size -= 1
            if not names:
                self.empty.append(bucket)
            self._take_up(names, bucket)
        next_bucket = self._buckets[-1] if self._buckets else "~"
        # The usual case at once: all of them.
        cut = 0 if self._hand and self._hand[0][0] < next_bucket else len(self._hand)
        while cut and self._hand[cut - 1][0] < next_bucket:  # nothing in there is older
            cut -= 1
        final = self._hand[cut:]
        del self._hand[cut:]
        found = bool(final)
        self._final = final  # other threads take from it at once, and may leave nothing of it
        return found

    def _take_up(self, names: list[str], directory: str) -> None:
        """Add the tasks of a directory to those in hand."""
        tasks = [name for name in names if name[16:17] == "_"]
        tasks.sort(reverse=True)  # three times as fast as to sort the pairs
        listed = [(name, directory) for name in tasks if name <= self._end]
        self.hides |= len(listed) < len(tasks)
        self.size += len(listed)
        self._hand += listed
        self._hand.sort(reverse=True)


# --- the filesystem: the only place that renames, deletes and lists -----------------------------------


def _rename(source: str, target: str) -> bool:
    """Rename; False if there is no `source`, or no directory for `target`."""
    try:
        os.rename(source, target)
    except OSError as error:
        if _is_gone(error, source):
            return False
        raise
    return True


def _unlink(path: str) -> bool:
    try:
        os.unlink(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _is_gone(error: OSError, path: str) -> bool:
    """Does this error say that somebody else moved `path`? ESTALE, over NFS, may mean just that."""
    if error.errno == errno.ESTALE:
        return not _exists(path)
    return error.errno in (errno.ENOENT, errno.ENOTDIR)


def _exists(path: str) -> bool:
    return _lstat(path) is not None


def _lstat(path: str) -> os.stat_result | None:
    try:
        return os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _try(call: Callable[..., object], *arguments: object) -> None:
    """For clean-up that may fail."""
    try:
        call(*arguments)
    except OSError:
        pass


def _list(directory: str) -> list[os.DirEntry[str]]:
    """The entries of a directory, in no order."""
    with os.scandir(directory) as entries:
        return list(entries)


def _names(directory: str, errors: list[OSError] | None = None) -> list[str]:
    """The regular files in a directory that may vanish. Errors are raised, or added to `errors`."""
    try:
        # Not _is_file: the call would be a third of what listing a large directory costs.
        return [entry.name for entry in _list(directory) if entry.is_file(follow_symlinks=False)]
    except OSError as error:
        if not _is_gone(error, directory):
            if errors is None:
                raise
            errors.append(error)
        return []


def _raise_unless_permission(errors: list[OSError]) -> None:
    """Raise the first error but for those about what other users keep to themselves."""
    others = [error for error in errors if not isinstance(error, PermissionError)]
    errors.clear()
    if others:
        del others[1:]
        raise others.pop()  # out of the lists, which its traceback is going to hold


def _find_claim(directory: str, id: str, attempt: int) -> str | None:
    """The path of a claim, whatever its deadline is by now."""
    for name in _names(directory):
        parsed = _parse(name)
        if parsed and parsed[:2] == (id, attempt):
            return f"{directory}/{name}"
    return None


def _modified(directories: list[str]) -> list[float]:
    """When each was changed, by the filesystem's clock."""
    try:
        return [os.stat(directory).st_mtime for directory in directories]
    except OSError:
        return []  # whoever lists it will see


def _make_directory(path: str) -> list[str]:
    """Make a directory and what is missing above it; return those that were made."""
    try:
        os.mkdir(path)
    except FileExistsError:
        if _exists(path) and not os.path.isdir(path):  # a file, or a link that leads nowhere
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path) from None
        return []  # even if it was removed again at once: whoever needs it will see
    except FileNotFoundError:
        parent = os.path.dirname(path)
        made = [] if os.path.isdir(parent) else _make_directory(parent)
        os.mkdir(path)
        return [*made, path]
    return [path]


def _remove_directory(path: str) -> None:
    """Remove it if it is empty and ours to remove; one that stays costs one listing."""
    _try(os.rmdir, path)


def _write_all(descriptor: int, data: bytes) -> None:
    written = os.write(descriptor, data)
    while written < len(data):
        written += os.write(descriptor, memoryview(data)[written:])


def _sync_directories(*directories: str) -> None:
    """Make what was created in, renamed into or out of these directories survive a power cut."""
    if os.name == "nt" or sys.platform == "win32":  # the second one is what type checkers know
        return  # a directory cannot be opened there
    for directory in directories:
        try:
            descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            # A bucket that was emptied and removed meanwhile.
            _sync_directories(os.path.dirname(directory))
            continue
        try:
            os.fsync(descriptor)
        except OSError as error:
            _add_path(error, directory)
            raise
        finally:
            os.close(descriptor)


def _sync_files(descriptors: list[int]) -> None:
    """Sync and close files; begin to write all of them before waiting for the first."""
    if sys.platform == "linux":
        for descriptor in descriptors:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    while descriptors:
        os.fsync(descriptors[-1])
        os.close(descriptors.pop())


def _open_regular(path: str, flags: int) -> int:
    """Open a file that a caller named, and nothing that would block."""
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError(f"path: {path!r} is not a regular file")
    except BaseException:
        _try(os.close, descriptor)
        raise
    return descriptor


# --- time ---------------------------------------------------------------------------------------------


def _wall_us() -> int:
    return int(time.time() * 1_000_000)


def _monotonic_us() -> int:
    return int(time.monotonic() * 1_000_000)


class _Clock:
    """The queue clock: the monotonic clock plus an offset, the same in all processes of one boot."""

    def __init__(self, offset_us: int) -> None:
        self.offset_us = offset_us
        # Reentrant: a signal handler may push in the midst of a push.
        self.lock = _thread.RLock()  # threading's, without the cost of importing it
        self._last_us = 0

    def now(self) -> int:
        return max(_monotonic_us() + self.offset_us, self._last_us)

    def stamp(self) -> int:
        """A time above all that this process has stamped: should the clock be frozen, order is not."""
        with self.lock:
            now_us = int(time.monotonic() * 1e6) + self.offset_us  # not called: twice for each task
            if now_us <= self._last_us:
                now_us = self._last_us + 1
            self._last_us = now_us
            return now_us


_clocks: weakref.WeakValueDictionary[tuple[str, int], _Clock] = weakref.WeakValueDictionary()


def _read_offset(path: str) -> int | None:
    """The clock's offset; None if there is no such file, or it is broken."""
    try:
        descriptor = os.open(path, _READ_FLAGS)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENXIO):
            return None  # not there, a link, a socket
        raise
    try:
        text = os.read(descriptor, 100).decode("ascii", "replace")
    except OSError as error:
        _add_path(error, path)
        raise
    finally:
        os.close(descriptor)
    # The line's end is what a half-written number lacks.
    if not (text.endswith("\n") and _is_digits(text[:-1].removeprefix("-"))):
        return None
    offset_us = int(text)
    return offset_us if 0 <= _monotonic_us() + offset_us < _LAST_CLOCK_US else None


# --- owners -------------------------------------------------------------------------------------------


class _Identity:
    """What tells this process from every other one, here and elsewhere, now and later."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        itself = _read_process("self")
        self.start = itself[2] if itself else "0"
        boot = _read_text("/proc/sys/kernel/random/boot_id")
        if boot:
            # A time namespace has a monotonic clock of its own.
            self.boot = f"{boot.replace('-', '')[:12]}.{_namespace('time')}"
            self.place = f"{self.boot}.{_namespace('pid')}"
        else:
            # Not Linux. The boot is told by when it was, which only a change of the wall clock alters.
            up_s = time.monotonic()
            if sys.platform == "darwin":
                up_s = time.clock_gettime(time.CLOCK_MONOTONIC)  # the other one stops during sleep
            self.place = f"{zlib.crc32(_host_name().encode()):08x}"
            self.boot = f"{self.place}.{int(time.time() - up_s) // 100}"
        # Mounted from another PID namespace, /proc shows other processes under our numbers.
        self.sees_processes = _read_link("/proc/self") == str(self.pid)


def _host_name() -> str:
    if sys.platform == "win32":
        return os.environ.get("COMPUTERNAME", "")
    return os.uname().nodename


def _read_text(path: str) -> str | None:
    """A file of /proc; None if there is none for us.

    Other errors are raised: a process short of descriptors must not take itself for another one.
    """
    try:
        with open(path, "rb") as file:
            return file.read().decode("ascii", "replace").strip()
    except (FileNotFoundError, NotADirectoryError, PermissionError, ProcessLookupError):
        return None


def _read_link(path: str) -> str:
    """What a link of /proc says, or nothing; other errors are raised here, too."""
    try:
        return os.readlink(path)
    except (FileNotFoundError, NotADirectoryError, PermissionError, AttributeError):
        return ""


def _namespace(kind: str) -> str:
    # "0": a kernel without this kind
    return "".join(filter(str.isdigit, _read_link(f"/proc/self/ns/{kind}"))) or "0"


def _read_process(pid: int | str) -> tuple[str, int, str] | None:
    """State, number of threads and start time of a process; None if /proc does not tell: proc(5)."""
    fields = (_read_text(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    return (fields[0], int(fields[17]), fields[19]) if len(fields) > 19 else None


def _parse_owner(name: str) -> tuple[str, int, str, str, str] | None:
    """node_id, PID, start time, place and token; None if this is not the name of an owner."""
    fields = name.split("~")
    if len(fields) != 5 or not (all(fields) and _is_digits(fields[1]) and _is_digits(fields[2])):
        return None
    node_id, pid, start, place, token = fields
    return node_id, int(pid), start, place, token


def _is_alive(owner: str, node_id: str) -> bool | None:
    """Is this owner alive? None if that cannot be known from here, and its lease must decide.

    node_id is the judge's. Only proof counts: a process that is there, but whose start time /proc does
    not tell (hidepid, another user's container), is alive.
    """
    parsed = _parse_owner(owner)
    if parsed is None:
        return None
    node, pid, start, place, token = parsed
    me = _identity()
    if place != me.place:  # another machine, boot or container; a node_id is in one place at a time
        known = "." in place and "." in me.place  # or /proc did not tell one of us where it is
        return False if node == node_id and known else None
    if pid == me.pid and start == me.start:
        return owner in _owners if token.startswith(_interpreter) else None
    if os.name == "nt":
        return None  # os.kill(pid, 0) would end that process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass  # not permitted: it is there
    try:
        seen = _read_process(pid) if me.sees_processes else None
    except OSError:
        return True  # unknown
    if seen is None:
        return True
    state, threads, started = seen
    if started != start:
        return False  # the number was given to another process
    return not (state in "ZX" and threads < 2)  # a zombie's other threads may still be at work


_me: _Identity | None = None
_fork_lock = _thread.RLock()
_generation = 0  # how many forks away this process is from the one that imported this module
_forks = 0  # of this process: tasks popped before one are held by the other process as well
# The objects of all copies of this file in this interpreter, for several libraries may have vendored
# it. Other interpreters of this process have objects that we know nothing of: hence the tag.
_interpreter: str = sys.__dict__.setdefault("_femtoqueue_interpreter", os.urandom(2).hex())
_owners: weakref.WeakValueDictionary[str, object]
_owners = sys.__dict__.setdefault("_femtoqueue_owners", weakref.WeakValueDictionary())


def _identity() -> _Identity:
    global _me
    if _me is None:
        _me = _Identity()
    return _me


def _look_soon(root: str) -> None:
    """An object of this process is gone: its tasks come back at the next pop of any other."""
    for queue in _objects_on(root):
        queue._next_look_us = 0


def _objects_on(root: str) -> list[FemtoQueue]:
    """This process's objects on one directory, as far as they are of this copy of the file."""
    # At once: values() fails when another thread makes an object meanwhile.
    objects = [reference() for reference in _owners.valuerefs()]
    return [queue for queue in objects if isinstance(queue, FemtoQueue) and queue._root == root]


def _note_fork() -> None:
    global _forks
    _forks += 1


def _note_fork_in_child() -> None:
    """After a fork: the child is another owner, and no lock may stay held by a thread it lacks.

    Each object becomes that owner at its next call, which can raise what goes wrong then.
    """
    global _me, _generation, _fork_lock
    _me = None
    _generation += 1
    _note_fork()
    _fork_lock = _thread.RLock()
    _owners.clear()
    for clock in list(_clocks.values()):
        clock.lock = _thread.RLock()


if sys.platform != "win32":
    os.register_at_fork(after_in_parent=_note_fork, after_in_child=_note_fork_in_child)


# --- arguments ----------------------------------------------------------------------------------------


def _as_bytes(data: object) -> bytes:
    if isinstance(data, bytes):
        return data
    if isinstance(data, str):
        raise TypeError("data: expected bytes, got str; push text.encode()")
    try:
        return bytes(memoryview(data))  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"data: expected a bytes-like object, got {type(data).__name__}") from None


def _path(name: str, path: str | os.PathLike[str]) -> str:
    text = os.fspath(path) if hasattr(path, "__fspath__") else path
    if not isinstance(text, str):
        raise TypeError(f"{name}: expected str or os.PathLike[str], got {type(text).__name__}")
    return text


def _check_node_id(node_id: object) -> None:
    if not isinstance(node_id, str):
        raise TypeError(f"node_id: expected str, got {type(node_id).__name__}")
    if not (node_id and node_id.isprintable()) or _FORBIDDEN & set(node_id):
        no = " ".join(sorted(_FORBIDDEN))
        raise ValueError(f"node_id: {node_id!r} must be printable, not empty, and without {no}")
    if len(node_id.encode()) > 64:
        raise ValueError(f"node_id: {node_id!r} is longer than 64 bytes; use a shorter name")


def _as_due_us(time_us: int | datetime.datetime) -> int:
    import datetime

    if isinstance(time_us, int):
        due_us = time_us
    elif isinstance(time_us, datetime.datetime):
        if time_us.utcoffset() is None:
            raise ValueError("time_us: a datetime without a time zone is ambiguous; .astimezone() it")
        due_us = round(time_us.timestamp() * 1_000_000)
    else:
        raise TypeError(
            f"time_us: expected int microseconds or an aware datetime, got {type(time_us).__name__}"
        )
    if not 10**14 <= due_us < _MAX_US:
        raise ValueError(
            f"time_us: {due_us} is not a time in microseconds since the epoch; "
            "int(time.time() * 1_000_000) is the present"
        )
    return due_us


def _check_number(name: str, value: float, least: float, most: float, unit: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number of {unit}, got {type(value).__name__}")
    if not least <= value <= most or (isinstance(value, int) and value > 1e300):  # no float holds it
        raise ValueError(f"{name}: {value} is not between {least:g} and {most:g} ({unit})")


def _check_timeout(timeout: float | None) -> None:
    if timeout is not None:
        _check_number("timeout", timeout, 0, float("inf"), "seconds, or None to wait for ever")


def _check_int(name: str, value: int, least: int, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: {value} must be {wanted}")


def _check_has_run(result: object) -> None:
    import inspect

    if inspect.isawaitable(result) or inspect.isgenerator(result) or inspect.isasyncgen(result):
        raise TypeError(
            f"handler: returned a {type(result).__name__}, which has not run; "
            "if it is async, hand over lambda task: asyncio.run(handler(task))"
        )


def _check_flag(name: str, value: object) -> None:
    if not isinstance(value, int):
        raise TypeError(f"{name}: expected True or False, got {value!r}")


def _check_state(state: str, states: Sequence[str]) -> None:
    if state not in states:
        raise ValueError(f"state: {state!r} is none of {', '.join(states)}")


# --- errors -------------------------------------------------------------------------------------------


def _not_found(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def _add_path(error: BaseException, path: str) -> None:
    """An error about a descriptor lacks it."""
    if isinstance(error, OSError) and error.filename is None:
        error.filename = path


def _log(message: str, *arguments: object, error: Exception | None = None) -> None:
    try:
        import logging  # costs more to import than this module
    except OSError:
        return  # out of descriptors: no reason to stop what goes on

    logging.getLogger("femtoqueue").warning(message, *arguments, exc_info=error)


# --- signals ------------------------------------------------------------------------------------------


class _StopOnSignals:
    """Collects signals to end, and raises at the second one. Only the main thread gets any."""

    def __enter__(self) -> list[int]:
        import signal
        import threading

        self._signal = signal.signal
        self._before: dict[int, Any] = {}
        caught: list[int] = []
        pid = os.getpid()

        def catch(number: int, frame: types.FrameType | None) -> None:
            # In a process that the handler forked, it means what it did before.
            if os.getpid() != pid:
                signal.signal(number, self._before[number])
                signal.raise_signal(number)
                return
            caught.append(number)
            if len(caught) > 1:
                raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGTERM, signal.SIGINT]
            if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
                numbers.append(signal.SIGHUP)
            for number in numbers:
                self._before[number] = signal.signal(number, catch) or signal.SIG_DFL
        return caught

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            self._signal(number, handler)


# --- the command line ---------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, as `python femtoqueue.py DIR COMMAND` does; return its exit status.

    0: done; 1: nothing was done, or it failed; 2: wrong usage.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.call(options)  # type: ignore[no-any-return]
    except (OSError, FemtoQueueError, UnicodeError) as error:
        return _complain(error)
    except (ValueError, TypeError, OverflowError) as error:
        parser.error(str(error))


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="femtoqueue", description="A task queue in a directory, from the shell."
    )
    parser.add_argument("--version", action="version", version=f"femtoqueue {__version__}")
    parser.add_argument("dir", metavar="DIR", help="the queue's directory")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(call: Callable[[argparse.Namespace], int], help: str) -> Callable[..., object]:
        name = call.__name__.removeprefix("_command_")
        parser = commands.add_parser(name, help=help, description=help)
        parser.set_defaults(call=call)
        return parser.add_argument

    add = command(_command_status, "how many tasks each state holds, and who works on what")
    add("--json", action="store_true", help="for programs")
    add("--watch", action="store_true", help="again every two seconds, until Ctrl-C")
    add = command(_command_list, "the ids in one state, oldest first")
    add("state", choices=STATES)
    add = command(_command_push, "add files, or standard input, as tasks; print their ids")
    add("files", nargs="*", metavar="FILE", help="none: standard input")
    add = command(_command_schedule, "add standard input as a task for later; print its id")
    add("when", help="ISO time (local unless it has an offset), or +30s, +10m, +2h, +1d")
    add = command(_command_run, "run a command for each task, with the payload as its standard input")
    add("--until-empty", action="store_true", help="stop when nothing is pending or due")
    add("--max-attempts", type=int, metavar="N", help="then the task fails (default: no limit)")
    add("cmd", metavar="-- CMD", help="exit status 0 is done, others are retried")
    add("arguments", nargs=argparse.REMAINDER, help="of the command")
    add = command(_command_requeue, "make failed, corrupt or done tasks pending again")
    add("ids", nargs="+", metavar="ID")
    add = command(_command_cancel, "drop pending or scheduled tasks")
    add("ids", nargs="+", metavar="ID")
    add = command(_command_purge, "delete tasks that were finished some time ago")
    add("state", choices=_FINISHED)
    add("age", help="how long ago: 30s, 10m, 2h, 7d")
    return parser


def _complain(message: object) -> int:
    print(f"femtoqueue: {message}", file=sys.stderr)
    return 1


def _open(options: argparse.Namespace, max_attempts: int | None = None) -> FemtoQueue:
    # Hosts and containers are often named alike, and a node_id must not be in two places at a time.
    place = _host_name() + _identity().place
    node_id = f"cli-{zlib.crc32(place.encode()):08x}"
    return FemtoQueue(options.dir, node_id, max_attempts=max_attempts)


def _open_existing(options: argparse.Namespace) -> FemtoQueue:
    if not os.path.isdir(f"{options.dir}/in_progress"):
        raise FemtoQueueError(f"there is no queue at {options.dir}; push makes one")
    return _open(options)


def _seconds(text: str) -> float:
    """Seconds in "30s", "10m", "2h" or "7d"."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:])
    try:
        if unit and 0 <= (seconds := float(text[:-1]) * unit) < 1e10:
            return seconds
    except ValueError:
        pass
    raise ValueError(f"{text!r} is no length of time; write 30s, 10m, 2h or 7d")


def _command_status(options: argparse.Namespace) -> int:
    import json

    queue = _open_existing(options)
    while True:
        report = _report(queue)
        print(json.dumps(report) if options.json else _as_table(report), flush=True)
        if not options.watch:
            return 0
        time.sleep(2)


def _report(queue: FemtoQueue) -> dict[str, list[dict[str, object]]]:
    """What the `status` command shows: each state, and each owner of claims."""
    states: list[dict[str, object]] = []
    deadlines_us: dict[str, list[int]] = {}  # by owner
    for state in STATES:
        now_us = _wall_us() if state == "scheduled" else queue._clock.now()
        count = 0
        oldest_s = None
        for id, time_us, directory in queue._walk(state):
            count += 1
            if oldest_s is None:
                oldest_s = (now_us - (time_us if state == "scheduled" else _time_of(id))) / 1e6
            if state == "in_progress":
                deadlines_us.setdefault(os.path.basename(directory), []).append(time_us)
        states.append({"state": state, "count": count, "oldest_s": oldest_s})
    alive = {True: "yes", False: "no", None: "unknown"}
    owners: list[dict[str, object]] = [
        {
            "node_id": owner.split("~")[0],
            "pid": int(owner.split("~")[1]),
            "alive": alive[_is_alive(owner, queue.node_id)],
            "tasks": len(leases),
            "lease_left_s": (min(leases) - queue._clock.now()) / 1e6,
        }
        for owner, leases in deadlines_us.items()
    ]
    return {"states": states, "owners": owners}


def _as_table(report: dict[str, list[dict[str, object]]]) -> str:
    lines = []
    for rows in report.values():
        if rows:
            table = [[name.removesuffix("_s") for name in rows[0]]]
            table += [[_cell(*item) for item in row.items()] for row in rows]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table] + [""]
    return "\n".join(lines[:-1])


def _cell(column: str, value: object) -> str:
    if isinstance(value, float) and column.endswith("_s"):
        for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
            if abs(value) >= 2 * length:
                return f"{value / length:.0f}{unit}"
        return f"{value:.0f}s"
    return "-" if value is None else str(value)


def _command_list(options: argparse.Namespace) -> int:
    id = None
    for id in _open_existing(options).ids(options.state):
        print(id)
    return 1 if id is None else 0


def _command_push(options: argparse.Namespace) -> int:
    queue = _open(options)
    for path in options.files:
        if not os.path.exists(path):
            raise FemtoQueueError(
                f"there is no file {path!r}; to push text: echo ... | femtoqueue DIR push"
            )
        print(queue.push_file(path), flush=True)
    if not options.files:
        print(queue._add(_chunks(0)))
    return 0


def _command_schedule(options: argparse.Namespace) -> int:
    import datetime

    if options.when.startswith("+"):
        due_us = _as_due_us(_wall_us() + int(_seconds(options.when[1:]) * 1_000_000))
    else:
        try:
            due = datetime.datetime.fromisoformat(options.when.removesuffix("Z"))
        except ValueError:
            raise ValueError(f"{options.when!r} is no time; write 2030-01-31T08:00 or +10m") from None
        in_utc = options.when.endswith("Z")  # which Python 3.10 does not read
        due_us = _as_due_us(due.replace(tzinfo=datetime.timezone.utc) if in_utc else due.astimezone())
    print(_open(options)._add(_chunks(0), due_us))
    return 0


def _command_run(options: argparse.Namespace) -> int:
    import logging
    import shutil

    if shutil.which(options.cmd) is None:
        # Not worth an attempt of each task.
        raise ValueError(f"there is no command {options.cmd!r}; for a pipeline: sh -c '...'")

    class OneLine(logging.Formatter):
        def formatException(self, ei: object) -> str:
            return ""

    console = logging.StreamHandler()
    console.setFormatter(OneLine("femtoqueue: %(message)s"))
    logging.getLogger("femtoqueue").addHandler(console)

    def handle(task: FemtoTask) -> None:
        if status := _run_command([options.cmd, *options.arguments], task):
            raise FemtoQueueError(f"{options.cmd}: exit status {status}")

    if not os.path.isdir(options.dir):
        _complain(f"{options.dir}: a new queue")  # or a mistyped one would go unnoticed
    with _open(options, options.max_attempts) as queue:
        count = queue.run(handle, until_empty=options.until_empty)
    return 0 if count or not options.until_empty else 1


def _run_command(command: list[str], task: FemtoTask) -> int:
    import signal
    import subprocess

    with open(task.path, "rb", buffering=0) as payload:
        payload.seek(task._payload_start)
        # The claim is renamed when its lease is renewed; the open file has a name that stays.
        path = f"/proc/{os.getpid()}/fd/{payload.fileno()}"
        environment = {
            **os.environ,
            "FEMTOQUEUE_ID": task.id,
            "FEMTOQUEUE_ATTEMPT": str(task.attempt),
            "FEMTOQUEUE_PATH": path if os.path.exists(path) else task.path,
        }
        # In a session of its own: Ctrl-C is for us, who let it finish.
        child = subprocess.Popen(
            command, stdin=payload, env=environment, start_new_session=sys.platform != "win32"
        )
        try:
            return child.wait()
        except BaseException:
            if sys.platform == "win32":
                child.kill()
            else:
                _try(os.killpg, child.pid, signal.SIGKILL)  # unless it runs as somebody else now
            child.wait()
            raise


def _command_requeue(options: argparse.Namespace) -> int:
    queue = _open_existing(options)
    return _for_each(options.ids, queue, queue.requeue, "failed, corrupt or done")


def _command_cancel(options: argparse.Namespace) -> int:
    queue = _open_existing(options)
    return _for_each(options.ids, queue, queue.cancel, "pending or scheduled")


def _for_each(ids: list[str], queue: FemtoQueue, call: Callable[[str], bool], wanted: str) -> int:
    status = 0
    for id in ids:
        if not call(id):
            state = queue.status(id)
            status = _complain(f"{id} is {state}, not {wanted}" if state else f"there is no task {id}")
    return status


def _command_purge(options: argparse.Namespace) -> int:
    count = _open_existing(options).purge(options.state, _seconds(options.age))
    print(count)
    return 0 if count else 1


def _script() -> None:
    import signal

    if sys.platform != "win32":
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... list done | head` ends quietly
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        # To the shell, which ends its script too, an interrupt must look like one.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    _script()

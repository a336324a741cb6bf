"""Which file system a path is on, and whether other hosts have the same one (L3, stdlib only)."""

import os
import re
import socket
from pathlib import Path

NETWORK = frozenset(
    "nfs nfs4 lustre gpfs beegfs fhgfs ceph cifs smb3 wekafs panfs pvfs2 afs fuse.glusterfs "
    "fuse.ceph fuse.juicefs".split()
)
"""Kinds of file systems on which a file is the same one wherever they are mounted."""
MOUNTS = Path("/proc/self/mountinfo")


def volume_of(path: Path) -> str:
    """A name of the file system of a path that exists: the same on all hosts only where it is one
    that they share, otherwise with this host's name in it. A doubt makes it this host's own."""
    real, device = os.path.realpath(path), path.stat().st_dev
    own = f"{socket.gethostname()} {device}"
    try:
        lines = MOUNTS.read_text().splitlines()
    except OSError:
        return own
    mount = max(
        (m for m in map(_mount, lines) if m and _holds(m[0], real)), default=None, key=_depth
    )
    return own if mount is None or mount[1] not in NETWORK else f"{mount[1]} {mount[2]}"


def _mount(line: str) -> tuple[str, str, str] | None:
    """(place, kind, what is mounted) of a line of mountinfo, see proc(5)."""
    before, dash, after = line.partition(" - ")
    words, more = before.split(" "), after.split(" ")
    if not dash or len(words) < 5 or len(more) < 2:
        return None
    place, kind, source = (re.sub(r"\\([0-7]{3})", _letter, w) for w in (words[4], *more[:2]))
    return place, kind, f"{source} {words[3]}"


def _letter(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))


def _holds(place: str, path: str) -> bool:
    return path == place or path.startswith(place.rstrip("/") + "/")


def _depth(mount: tuple[str, str, str]) -> int:
    return len(mount[0])

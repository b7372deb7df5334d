"""The filter of system calls of a sandbox: none that makes namespaces or mounts, or reaches rarely used parts of Linux.

In a user namespace of its own, the code could mount a folder of any size in memory, which the limits do not count.
"""

from __future__ import annotations

import errno
import platform
import struct

_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        56,
        "unshare=272 setns=308 mount=165 umount2=166 pivot_root=155 chroot=161 ptrace=101 keyctl=250 add_key=248 "
        "request_key=249 bpf=321 perf_event_open=298 userfaultfd=323 process_vm_readv=310 process_vm_writev=311",
    ),
    "aarch64": (
        0xC00000B7,
        220,
        "unshare=97 setns=268 mount=40 umount2=39 pivot_root=41 chroot=51 ptrace=117 keyctl=219 add_key=217 "
        "request_key=218 bpf=280 perf_event_open=241 userfaultfd=282 process_vm_readv=270 process_vm_writev=271",
    ),
}
"""Machine -> its number in `linux/audit.h`, that of `clone`, and those of the refused calls."""
_REFUSED_EVERYWHERE = (
    "io_uring_setup=425 open_tree=428 move_mount=429 fsopen=430 fsconfig=431 fsmount=432 fspick=433 mount_setattr=442"
)
_CLONE3, _X32, _NEW_USER = 435, 0x40000000, 0x10000000
_LOAD, _EQUAL, _AT_LEAST, _HAS_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER, _MACHINE, _FIRST_ARGUMENT = 0, 4, 16


def machine_is_known() -> bool:
    """Return whether the numbers of this machine's system calls are known here."""
    return platform.machine() in _ARCHITECTURES


def seccomp_filter() -> bytes:
    """Return the program for seccomp, in classic BPF."""
    architecture, clone, refused = _ARCHITECTURES[platform.machine()]
    program = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, _NUMBER)]
    program += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    # Its flags are in memory, out of reach of a filter; libraries then use `clone`.
    program += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | errno.ENOSYS)]
    for call in f"{refused} {_REFUSED_EVERYWHERE}".split():
        program += [(_EQUAL, 0, 1, int(call.partition("=")[2])), (_RETURN, 0, 0, _ERROR | errno.EPERM)]
    program += [(_EQUAL, 0, 3, clone), (_LOAD, 0, 0, _FIRST_ARGUMENT), (_HAS_BIT, 0, 1, _NEW_USER)]
    program += [(_RETURN, 0, 0, _ERROR | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *instruction) for instruction in program)

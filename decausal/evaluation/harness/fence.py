"""Restricts its own process and then runs ../program.py in it. `contained` starts it in a separate process.

It imports nothing from the package, and runs without site packages.

Source: seccomp (prctl(2), Documentation/userspace-api/seccomp_filter.rst) and Landlock (landlock(7)) of the Linux
kernel. Numbers of system calls are for x86-64 and for the table that AArch64 and RISC-V share.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
import sys

_LIBC = ctypes.CDLL(None, use_errno=True)
_ERRNO_EPERM, _ERRNO_ENOSYS = 0x00050001, 0x00050026  # SECCOMP_RET_ERRNO with EPERM and ENOSYS
_ALLOW = 0x7FFF0000
_CLONE_THREAD = 0x00010000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446

_ARCHITECTURES = {
    "x86_64": (
        0xC000003E,
        {"clone": 56, "clone3": 435, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "socket": 41}
        | {"socketpair": 53, "kill": 62, "tkill": 200, "tgkill": 234, "rt_sigqueueinfo": 129, "rt_tgsigqueueinfo": 297}
        | {"pidfd_send_signal": 424, "ptrace": 101, "process_vm_writev": 311, "io_uring_setup": 425, "setsid": 112}
        | {"setpgid": 109, "unshare": 272, "prlimit64": 302, "memfd_create": 319, "truncate": 76, "chmod": 90}
        | {"fchmod": 91, "chown": 92, "fchown": 93, "lchown": 94, "fchownat": 260, "fchmodat": 268, "fchmodat2": 452}
        | {"utime": 132, "utimes": 235, "utimensat": 280, "futimesat": 261, "setxattr": 188, "lsetxattr": 189},
    ),
    "aarch64": (
        0xC00000B7,
        {"clone": 220, "clone3": 435, "execve": 221, "execveat": 281, "socket": 198, "socketpair": 199, "kill": 129}
        | {"tkill": 130, "tgkill": 131, "rt_sigqueueinfo": 138, "rt_tgsigqueueinfo": 240, "pidfd_send_signal": 424}
        | {"ptrace": 117, "process_vm_writev": 271, "io_uring_setup": 425, "setsid": 157, "setpgid": 154}
        | {"unshare": 97, "prlimit64": 261, "memfd_create": 279, "truncate": 45, "fchmod": 52, "fchmodat": 53}
        | {"fchownat": 54, "fchown": 55, "fchmodat2": 452, "utimensat": 88, "setxattr": 5, "lsetxattr": 6},
    ),
}


def limit(seconds: int, memory: int, disk: int, files: int) -> None:
    """Sets this process's limits, which it cannot raise again."""
    for which, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, disk),
        (resource.RLIMIT_NOFILE, files),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_STACK, 64 << 20),
    ):
        _, hard = resource.getrlimit(which)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(which, (value, value))


def keep_to(folder: str) -> bool:
    """Restricts this process to writing below a folder. Returns False if the kernel has no Landlock."""
    abi = _LIBC.syscall(_LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if abi < 1:
        return False
    # Write, remove and make of any kind: bits 1 and 4 to 12; on later kernels also refer (13) and truncate (14).
    handled = sum(1 << bit for bit in (1, 4, 5, 6, 7, 8, 9, 10, 11, 12))
    handled |= (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0)
    attributes = struct.pack("=Q", handled)
    rules = _LIBC.syscall(_LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    if rules < 0:
        return False
    for path in (folder, "/dev/null"):
        place = os.open(path, os.O_PATH)
        allowed = handled if os.path.isdir(path) else handled & (1 << 1 | 1 << 14)
        rule = struct.pack("=Qi", allowed, place)
        _LIBC.syscall(_LANDLOCK_ADD, ctypes.c_int(rules), ctypes.c_int(1), rule, ctypes.c_uint32(0))
        os.close(place)
    _LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    is_kept = _LIBC.syscall(_LANDLOCK_RESTRICT, ctypes.c_int(rules), ctypes.c_uint32(0)) == 0
    os.close(rules)
    return is_kept


def forbid_calls() -> bool:
    """Forbids new processes, sockets, signals and changes of rights. Returns False if the calls' numbers are
    unknown."""
    if platform.machine() not in _ARCHITECTURES:
        return False
    architecture, calls = _ARCHITECTURES[platform.machine()]
    code = _filter(architecture, calls)
    buffer = ctypes.create_string_buffer(code)
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    _LIBC.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    return _LIBC.prctl(_SET_SECCOMP, _FILTER, program, 0, 0) == 0


def drop_capabilities() -> None:
    """Drops root's privileges, if there are any."""
    header, nothing = struct.pack("=Ii", 0x20080522, 0), bytes(24)
    _LIBC.capset(header, nothing)


def _filter(architecture: int, calls: dict[str, int]) -> bytes:
    """Returns the filter in classic BPF: (code, jump if true, jump if false, value) of each step.

    Threads are allowed: `clone` with CLONE_THREAD. `clone3` hides its flags, so the filter says that it does not exist,
    and the C library falls back to `clone`.
    """
    load, jump_if, jump_if_set, end = 0x20, 0x15, 0x45, 0x06
    forbidden = [number for name, number in calls.items() if name not in ("clone", "clone3")]
    steps = [
        (load, 0, 0, 4),  # the architecture
        (jump_if, 1, 0, architecture),
        (end, 0, 0, _ERRNO_EPERM),
        (load, 0, 0, 0),  # the call's number
    ]
    if platform.machine() == "x86_64":  # x32 calls have other numbers
        steps += [(0x35, 0, 1, 0x40000000), (end, 0, 0, _ERRNO_EPERM)]
    for number in forbidden:
        steps += [(jump_if, 0, 1, number), (end, 0, 0, _ERRNO_EPERM)]
    steps += [(jump_if, 0, 1, calls["clone3"]), (end, 0, 0, _ERRNO_ENOSYS)]
    steps += [(jump_if, 0, 3, calls["clone"]), (load, 0, 0, 16), (jump_if_set, 1, 0, _CLONE_THREAD)]
    steps += [(end, 0, 0, _ERRNO_EPERM), (end, 0, 0, _ALLOW)]
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


def main(arguments: list[str]) -> None:
    with open("../program.py", encoding="utf-8", errors="surrogateescape") as file:
        program = file.read()
    passed = os.open("../passed", os.O_WRONLY | os.O_CREAT, 0o600)
    limit(*map(int, arguments))
    keep_to(os.getcwd())
    drop_capabilities()
    forbid_calls()
    sys.argv = ["program.py"]
    exec(compile(program, "program.py", "exec"), {"__name__": "__main__"})
    os.write(passed, b"passed")  # not reached if the program ends itself
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])

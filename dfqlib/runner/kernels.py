"""The kernels in which notebooks of a batch run, each a process of its own.

Importing torch and its dependencies takes seconds, so on Linux one process imports what a batch needs and every kernel
is forked from it (Python's fork server). Other systems cannot safely fork a process that has loaded their graphics
libraries; there each kernel starts from nothing.
"""

import atexit
import functools
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any
from weakref import WeakSet

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager, KernelManager
from jupyter_client.provisioning import LocalProvisioner
from zmq import IPC_PATH_MAX_LEN

from dfqlib.places import PACKAGE

FORKS = sys.platform == "linux"
#: glibc keeps freed memory: every iteration needs the same blocks, and the system would clear their pages each time.
HELD_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_MAX_": "0"}
LAUNCHER = [sys.executable, "-m", "ipykernel_launcher"]


def cores() -> int:
    """The processor cores that this process may use, within its job's or container's limits."""
    from dask.system import cpu_count  # here, since it takes a third of a second that --list need not wait for

    return cpu_count()


def environment(threads: int) -> dict[str, str]:
    """The variables of a kernel that computes with ``threads`` threads, unless the user's own say otherwise."""
    path = os.pathsep.join(filter(None, [os.fspath(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    chosen = {"PYTHONPATH": path, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    return {"OMP_NUM_THREADS": str(threads)} | HELD_MEMORY | os.environ | chosen


@functools.cache  # the first call does it
def provide_home() -> None:
    """Give this process and its kernels a temporary folder where the user has no writable home, as in some containers.

    Kernels die without one. A home that can only be read is kept, for the weights in its caches.
    """
    home = os.path.expanduser("~")
    if os.access(home, os.W_OK):
        return
    spare = tempfile.mkdtemp(prefix="dfqlib-home-")
    atexit.register(shutil.rmtree, spare, ignore_errors=True)
    if not os.path.isdir(home):
        os.environ["HOME"] = spare
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "MPLCONFIGDIR"):
        os.environ.setdefault(name, spare)


def warm_up(modules: Iterable[str], threads: int) -> bool:
    """Start the process that kernels are forked from; it imports ``modules``, as far as they exist.

    Returns at once, with whether kernels can be forked here; to be called in the main thread.
    """
    if not FORKS:
        return False
    names = {"ipykernel.kernelapp", "ipykernel.debugger", *modules}  # a kernel imports the debugger as it starts
    # A fork runs the main program's imports and definitions unless it was preloaded, which Python < 3.14 forgets.
    names.update(name for name in sys.modules if name.partition(".")[0] in ("dfqlib", "rich"))
    if "torch" in names:
        names.add("torch._dynamo")  # which torch imports when the first optimizer is made
    forkserver.set_forkserver_preload(["__main__", *sorted(names)])
    before = dict(os.environ)
    # Read by torch and matplotlib as they are imported; without the second the debugger warns on the screen.
    os.environ.update(environment(threads) | {"PYDEVD_DISABLE_FILE_VALIDATION": "1"})
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: the batch stops its kernels after a Ctrl-C
    try:
        forkserver.ensure_running()
    except OSError:  # the path of the temporary folder leaves no room for the server's socket
        return False
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGINT, interrupt)
    return True


def kernel_manager(
    folder: Path, variables: dict[str, str], log: Path, sockets: Path, forked: bool, running: WeakSet[Any]
) -> type[AsyncKernelManager]:
    """A kernel manager that runs this very interpreter in ``folder``, whatever kernels the machine has.

    ``variables`` are the kernel's environment; what native code prints goes to ``log``, not over the screen; its
    sockets are in the folder ``sockets``. With ``forked``, which needs :func:`warm_up`, it is forked instead of
    started. Its process, which can be killed, is added to ``running``.
    """

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=[*LAUNCHER, "-f", "{connection_file}"], display_name="Python 3", language="python")

        async def start_kernel(self, **options: Any) -> None:
            kind = Forked if forked else LocalProvisioner
            self.provisioner = kind(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
            use_sockets(self, sockets)
            with open(log, "ab") as stream:
                options |= {"cwd": os.fspath(folder), "env": variables, "stdout": stream, "stderr": stream}
                await self._async_start_kernel(**options)
            running.add(self.provisioner.process)

    return ThisPython


def use_sockets(manager: KernelManager, folder: Path) -> None:
    """Connect to the kernel by sockets in ``folder``, which also holds its connection file.

    A port that was free when it was chosen may be taken when the kernel binds it, and its run would be lost. Where the
    path is too long for a socket, and on Windows, ports are used all the same.
    """
    path = os.fspath(folder / "kernel")
    manager.connection_file = f"{path}.json"
    if os.name == "posix" and len(os.fsencode(f"{path}-5")) <= IPC_PATH_MAX_LEN:  # a kernel has five
        manager.transport, manager.ip = "ipc", path


class Forked(LocalProvisioner):
    """Provisioner of kernels that are forked instead of started."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> KernelConnectionInfo:
        self.cwd, log = options["cwd"], options["stdout"].name
        arguments = cmd[len(LAUNCHER) :], self.cwd, options["env"], log
        self.process = ForkedProcess(target=_become_kernel, args=arguments)
        self.process.start()
        self.pid = self.pgid = self.process.pid
        return self.connection_info


class ForkedProcess(ForkServerProcess):
    """A forked kernel with the methods of :class:`subprocess.Popen` that a provisioner calls."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self) -> int | None:
        self.join()
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def _become_kernel(arguments: list[str], folder: str, env: dict[str, str], log: str) -> None:
    """The main function of a forked process: a kernel with this working folder, environment and log."""
    os.setsid()  # a group of its own, as a provisioner expects: signals to it reach the kernel's children too
    with open(log, "ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    threading.Thread(target=_end_with_the_batch, daemon=True).start()

    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(argv=arguments)


def _end_with_the_batch() -> None:
    """Exit when the batch was killed: nobody would receive the results."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

"""The kernels that notebooks of a batch run in, each a process of its own.

A kernel spends most of a short notebook's time importing torch and what goes with it. So on Linux one process imports
everything the notebooks of a batch need, once, and every kernel is forked from it (Python's own fork server). Other
systems do not fork a process safely that has loaded their graphics libraries; there each kernel starts from nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable
from multiprocessing import connection, forkserver
from multiprocessing.context import BaseContext
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
LAUNCHER = [sys.executable, "-m", "ipykernel_launcher"]


def cores() -> int:
    """The processor cores that this process may use: of a machine's, a job may have some, a container a quota."""
    from dask.system import cpu_count  # here, since it takes a third of a second that --list need not wait for

    return cpu_count()


def environment(threads: int) -> dict[str, str]:
    """The variables of a kernel that computes with ``threads`` threads, unless the user's own say otherwise."""
    path = os.pathsep.join(filter(None, [os.fspath(PACKAGE.parent), os.environ.get("PYTHONPATH")]))
    chosen = {"PYTHONPATH": path, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    return {"OMP_NUM_THREADS": str(threads)} | os.environ | chosen


def warm_up(modules: Iterable[str], threads: int) -> bool:
    """Start the process that kernels are forked from; it imports ``modules``, those of them that there are.

    Returns at once, with whether kernels can be forked here; to be called in the main thread.
    """
    if not FORKS:
        return False
    names = {"ipykernel.kernelapp", "ipykernel.debugger", *modules}  # a kernel imports the debugger as it starts
    # A fork runs the main program's file, as far as its imports and definitions, unless it was preloaded, which Python
    # before 3.14 forgets.
    names.update(name for name in sys.modules if name.partition(".")[0] in ("dfqlib", "rich"))
    if "torch" in names:
        names.add("torch._dynamo")  # which torch imports when the first optimizer is made
    before, interrupt = dict(os.environ), signal.getsignal(signal.SIGINT)
    forkserver.set_forkserver_preload(["__main__", *sorted(names)])
    os.environ.update(environment(threads))  # read by torch and matplotlib as they are imported
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # or the debugger warns on the screen
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited: Ctrl-C is for the batch, which stops its kernels
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
    sockets: Path, folder: Path, variables: dict[str, str], log: Path, threads: int, forks: bool, running: WeakSet[Any]
) -> type[AsyncKernelManager]:
    """A kernel manager that runs this very interpreter in ``folder``, whatever kernels the machine has.

    ``variables`` are added to its environment; what native code prints goes to ``log``, not over the screen. With
    ``forks``, which needs :func:`warm_up`, it is forked. Its process, which can be killed, is added to ``running``.
    Its sockets are in the folder ``sockets``.
    """

    class ThisPython(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return KernelSpec(argv=[*LAUNCHER, "-f", "{connection_file}"], display_name="Python 3", language="python")

        async def start_kernel(self, **options: Any) -> None:
            kind = Forked if forks else LocalProvisioner
            self.provisioner = kind(kernel_id=self.kernel_id, kernel_spec=self.kernel_spec, parent=self)
            use_sockets(self, sockets)
            with open(log, "ab") as stream:
                output = {"stdout": stream, "stderr": stream}
                await self._async_start_kernel(
                    **(options | {"cwd": os.fspath(folder), "env": environment(threads) | variables} | output)
                )
            running.add(self.provisioner.process)

    return ThisPython


def use_sockets(manager: KernelManager, folder: Path) -> None:
    """Let a kernel that is to be started be reached by sockets in ``folder``, which also holds its connection file.

    A port that was free when it was chosen may be another process's when the kernel comes to bind it, and then its run
    is lost. Where the path is too long for a socket, and on Windows, it is by ports all the same.
    """
    path = os.fspath(folder / "kernel")
    manager.connection_file = f"{path}.json"
    if os.name == "posix" and len(os.fsencode(f"{path}-5")) <= IPC_PATH_MAX_LEN:  # a kernel has five
        manager.transport, manager.ip = "ipc", path


class Forked(LocalProvisioner):
    """Provisioner of kernels that are forked instead of started."""

    async def launch_kernel(self, cmd: list[str], **options: Any) -> KernelConnectionInfo:
        arguments = cmd[len(LAUNCHER) :]
        self.process = ForkedProcess((arguments, options["cwd"], options["env"], options["stdout"].name))
        self.pid = self.pgid = self.process.pid
        self.cwd = options["cwd"]
        return self.connection_info


class ForkedProcess:
    """A forked kernel with the methods of :class:`subprocess.Popen` that a provisioner calls."""

    stdin = stdout = stderr = None

    def __init__(self, arguments: tuple[list[str], str, dict[str, str], str]) -> None:
        context: BaseContext = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_become_kernel, args=arguments)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def terminate(self) -> None:
        self._process.terminate()


def _become_kernel(arguments: list[str], folder: str, env: dict[str, str], log: str) -> None:
    """What a forked process does: it takes its surroundings and is a kernel until it is told to stop."""
    os.setsid()  # a group of its own, as a provisioner expects: signals to it reach the kernel's children too
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    threading.Thread(target=_end_with_the_batch, daemon=True).start()

    from ipykernel.kernelapp import IPKernelApp

    IPKernelApp.launch_instance(argv=arguments)


def _end_with_the_batch() -> None:
    """A kernel whose batch was killed would compute on for nobody."""
    connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)

"""Freed memory stays with the process inside of a loop, and goes back to the system behind it."""

import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

from dfqlib.acceleration import without
from dfqlib.memory import held_memory

MEGABYTES = 128  # of one tensor: more than glibc ever keeps of its own accord
KEPT, GIVEN_BACK = 0.9 * MEGABYTES, 0.1 * MEGABYTES

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="without glibc nothing is held")


def resident() -> float:
    """Megabytes of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def grown_by_a_freed_tensor() -> float:
    before = resident()
    torch.ones(MEGABYTES * 2**18)  # of 4 bytes
    return resident() - before


def grown_inside_behind_and_outside() -> tuple[float, float, float]:
    before = resident()
    with held_memory():
        inside = grown_by_a_freed_tensor()
    return inside, resident() - before, grown_by_a_freed_tensor()


def grown_behind_an_error() -> float:
    before = resident()
    with pytest.raises(KeyError), held_memory():
        grown_by_a_freed_tensor()
        raise KeyError
    return resident() - before


def grown_where_it_is_off() -> float:
    with without("held_memory"), held_memory():
        return grown_by_a_freed_tensor()


@pytest.fixture(scope="module")
def fresh_process():
    """In one that has run other tests, a tensor may find room between living blocks, which glibc always keeps."""
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        yield lambda function: pool.submit(function).result()


def test_what_was_freed_stays_inside_only(fresh_process):
    inside, behind, outside = fresh_process(grown_inside_behind_and_outside)
    assert inside > KEPT
    assert behind < GIVEN_BACK
    assert outside < GIVEN_BACK


def test_given_back_also_behind_an_error(fresh_process):
    assert fresh_process(grown_behind_an_error) < GIVEN_BACK


def test_not_held_where_it_is_off(fresh_process):
    assert fresh_process(grown_where_it_is_off) < GIVEN_BACK

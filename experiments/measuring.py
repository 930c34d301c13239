"""How the benchmarks measure a step: seconds, its matrix products alone, memory, on CPU or GPU."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tl_laai.products import CAPABILITY, about_cpu

Step = Callable[[], tuple[torch.Tensor, torch.Tensor]]

WARM_UP = 3  # after so many steps the engine replays a recording on a GPU
MAKES = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}
MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "addmm_", "baddbmm", "linear")
# What the engine multiplies with on x86 CPUs that are not Intel's.
ONEDNN = "_linear_pointwise"


def hardware(device: str) -> str:
    """Short name of what multiplies; rows of other hardware are kept."""
    if device == "cuda":
        return torch.cuda.get_device_name().removeprefix("NVIDIA ").split()[0]
    about = about_cpu()
    make = next((make for name, make in MAKES.items() if name in about), platform.machine())
    # Generations of one make differ by a factor of two, and so do their widths of vectors.
    family = re.search(r"^cpu family\s*: (\d+)", about, re.MULTILINE)
    narrow = " without AVX-512" if CAPABILITY == "AVX2" else ""
    return (f"{make} family {family[1]}" if family else make) + narrow


class RecordProducts(TorchDispatchMode):
    """Notes the shapes, layouts and types of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in (*MATRIX_PRODUCTS, ONEDNN):
            pair = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            layouts = tuple((tuple(t.shape), tuple(t.stride()), t.dtype) for t in pair)
            self.calls[name == ONEDNN, layouts] += 1
        return func(*args, **(kwargs or {}))


def product_seconds(step: Step, device: str) -> tuple[float, float]:
    """Seconds and floating-point operations of a step's matrix products alone."""
    with RecordProducts() as record:
        step()
    seconds, operations, products = 0.0, 0.0, []
    for (by_onednn, layouts), count in record.calls.items():
        a, b = (
            torch.empty_strided(shape, stride, dtype=dtype, device=device).uniform_()
            for shape, stride, dtype in layouts
        )
        out = a @ (b.T if by_onednn else b)
        operations += count * 2.0 * a.numel() * out.shape[-1]
        multiply = (
            partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
            if by_onednn
            else partial(torch.matmul, a, b, out=out)
        )
        products += [multiply] * count
        if device == "cpu":
            seconds += count * min(timed(multiply, device) for _ in range(3))
    if device != "cpu":  # one graph of them all: started one by one, most would wait for that
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for multiply in products:
                multiply()
        seconds = min(timed(graph.replay, device) for _ in range(5))
    return seconds, operations


def timed(call: Callable[[], Any], device: str) -> float:
    start = time.perf_counter()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_megabytes(prepare: Callable[[], Step], device: str) -> float:
    """Largest growth of memory while a step runs: resident memory, sampled, or the GPU's own."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step = prepare()
        for _ in range(WARM_UP + 1):
            step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    step = prepare()
    step()  # what the first does beside the step is no part of it
    gc.collect()
    page = os.sysconf("SC_PAGE_SIZE")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return float("nan")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    # Freed memory that the allocator still holds would hide what the step takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    start, highest, done = resident(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not done.wait(0.002):
            highest = max(highest, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    done.set()
    watcher.join()
    return max(0, highest - start) / 2**20

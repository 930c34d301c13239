"""One step of a fit: the plain loop of a TransformerLens user against the engine, in one run.

    python experiments/benchmark_fit.py            # tables
    python experiments/benchmark_fit.py --json     # one row a line
    python experiments/benchmark_fit.py --from-rows  # print the rows on disk only

A step is one loss and gradient of one problem: N examples, Delta at one layer. All methods are
first checked to give the same loss and gradient, then timed in alternation; pyvene's trainable
intervention is one of them where that library is installed (`pip install pyvene`).
`matmul_share` is the time of a step's matrix products alone (the same shapes, timed in the same
run) over the time of the step. Peak memory is what a step adds to the loaded models.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pyvene_step import INSTALLED, pyvene_step
from tables import markdown
from torch.utils._python_dispatch import TorchDispatchMode

from tl_laai.engine import Engine
from tl_laai.models import load_model
from tl_laai.prefix import freeze
from tl_laai.products import about_cpu
from tl_laai.prompts import PromptTemplate, TokenisedExample, tokenise
from tl_laai.rows import read_rows, write_rows
from tl_laai.tasks import Task

MODEL = "gemma-3-270m"
TASK = "country-capital"
LAYER = 9
N = 10
# The answers' own tokens, without the newline that fits learn to write behind them.
TEMPLATE = PromptTemplate(answer_end="")
SHOTS = {"zero-shot": 0, "10-shot": 10}
ROUNDS = 3
MAKES = {"GenuineIntel": "Intel", "AuthenticAMD": "AMD"}
# Rows of other makes of CPU are kept.
CPU = next((make for name, make in MAKES.items() if name in about_cpu()), platform.machine())
OUT = Path(__file__).parent.parent / "figures" / "benchmark_fit.jsonl"
MATRIX_PRODUCTS = ("mm", "addmm", "bmm", "addmm_", "baddbmm", "linear")
# What the engine multiplies with on x86 CPUs that are not Intel's.
ONEDNN = "_linear_pointwise"


@dataclass
class Method:
    """One way to take a step; `step` returns the first problem's loss and gradient."""

    name: str
    backend: str
    n_problems: int
    step: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    seconds: list[float] = field(default_factory=list)


def plain_step(
    model: Any, examples: tuple[TokenisedExample, ...], delta: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """`run_with_hooks` over whole prompts, right-padded (harmless under a causal mask)."""
    rows = [[*e.prompt, *e.answer[:-1]] for e in examples]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    ends = torch.tensor([len(e.prompt) - 1 for e in examples])
    batch = torch.arange(len(rows))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = delta.clone().requires_grad_()

        def add(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z = z.clone()
            z[batch, ends] = z[batch, ends] + leaf
            return z

        hooks = [(f"blocks.{LAYER}.attn.hook_z", add)]
        logits = model.run_with_hooks(
            tokens, fwd_hooks=hooks, attention_mask=torch.ones_like(tokens), return_type="logits"
        )
        losses = []
        for i, example in enumerate(examples):
            answer = torch.tensor(example.answer)
            at = logits[i, ends[i] : ends[i] + len(answer)]
            losses.append(torch.nn.functional.cross_entropy(at, answer))
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach(), leaf.grad

    return step


def engine_step(
    model: Any, examples: tuple[TokenisedExample, ...], delta: torch.Tensor, n_problems: int
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    engine = Engine(
        freeze(model, examples), layers=[LAYER] * n_problems, rows=[range(N)] * n_problems
    )
    deltas = torch.stack([delta * (1 + i / n_problems) for i in range(n_problems)])
    problems = torch.arange(n_problems)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss, gradient = engine.value_and_grad(deltas, problems)
        return loss[0], gradient[0]

    return step


class RecordProducts(TorchDispatchMode):
    """Notes the shapes and layouts of every matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in (*MATRIX_PRODUCTS, ONEDNN):
            pair = [a for a in args if isinstance(a, torch.Tensor)][-2:]
            layouts = tuple((tuple(t.shape), tuple(t.stride())) for t in pair)
            self.calls[name == ONEDNN, layouts] += 1
        return func(*args, **(kwargs or {}))


def product_seconds(step: Callable[[], Any]) -> tuple[float, float]:
    """Seconds and floating-point operations of a step's matrix products alone."""
    with RecordProducts() as record:
        step()
    seconds, operations = 0.0, 0.0
    for (by_onednn, layouts), count in record.calls.items():
        a, b = (torch.empty_strided(shape, stride).uniform_() for shape, stride in layouts)
        out = a @ (b.T if by_onednn else b)
        multiply = (
            partial(torch.ops.mkldnn._linear_pointwise, a, b, None, "none", [], "")
            if by_onednn
            else partial(torch.matmul, a, b, out=out)
        )
        times = []
        for _ in range(3):
            start = time.perf_counter()
            multiply()
            times.append(time.perf_counter() - start)
        seconds += count * min(times)
        operations += count * 2.0 * a.numel() * out.shape[-1]
    return seconds, operations


def peak_megabytes(step: Callable[[], Any]) -> float:
    """Largest growth of resident memory while a step runs, sampled every 2 ms."""
    page = os.sysconf("SC_PAGE_SIZE")
    statm = Path("/proc/self/statm")
    if not statm.exists():
        return float("nan")

    def resident() -> int:
        return int(statm.read_text().split()[1]) * page

    gc.collect()
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


def as_hugging_face_loads() -> Any:
    from transformers import AutoModelForCausalLM

    from tl_laai.checkpoints import find_source

    folder = find_source(MODEL).folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)


def as_transformer_lens_loads(backend: str) -> Any:
    """The model as TransformerLens itself loads it: no memory layout of ours."""
    from transformers import AutoTokenizer

    from tl_laai.checkpoints import find_source

    source = find_source(MODEL)
    hf = as_hugging_face_loads()
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    if backend == "hooked":
        from transformer_lens import HookedTransformer

        model: Any = HookedTransformer.from_pretrained(
            source.official_name, hf_model=hf, tokenizer=tokenizer, device="cpu"
        )
    else:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(
            str(source.folder), hf_model=hf, tokenizer=tokenizer, device="cpu"
        )
    return model.requires_grad_(False)


def benchmark(rounds: int) -> list[dict[str, Any]]:
    plain = {b: as_transformer_lens_loads(b) for b in ("hooked", "bridge")}
    ours = {b: load_model(MODEL, backend=b, device="cpu") for b in ("hooked", "bridge")}
    hugging_face = as_hugging_face_loads() if INSTALLED else None
    split = Task.load(TASK).split(train=N, validation=10, seed=0)
    rows = []
    for prompts, shots in SHOTS.items():
        examples = tokenise(
            ours["bridge"],
            split.train,
            template=TEMPLATE,
            demonstrations=split.validation[:shots],
        )
        torch.manual_seed(0)
        delta = torch.randn(ours["bridge"].cfg.n_heads, ours["bridge"].cfg.d_head)
        methods = [Method(f"plain-{b}", b, 1, plain_step(plain[b], examples, delta)) for b in plain]
        if INSTALLED:
            step = pyvene_step(hugging_face, examples, LAYER, delta)
            methods.append(Method("pyvene", "hugging-face", 1, step))
        for backend, model in ours.items():
            for n in (1, 16):
                step = engine_step(model, examples, delta, n)
                methods.append(Method(f"engine-{n}", backend, n, step))
        loss, gradient = methods[1].step()
        for method in methods:
            other_loss, other = method.step()
            off = float((other - gradient).norm() / gradient.norm())
            if not (abs(float(other_loss - loss)) < 1e-4 * float(loss) and off < 1e-3):
                sys.exit(f"{method.name} on {method.backend}: gradient off by {off:.1e}")
        for _ in range(rounds):
            for method in methods:
                start = time.perf_counter()
                method.step()
                method.seconds.append((time.perf_counter() - start) / method.n_problems)
        reference = {
            m.backend: statistics.median(m.seconds) for m in methods if m.name.startswith("plain")
        }
        n_tokens = statistics.mean(len(e.prompt) for e in examples)
        for method in methods:
            seconds = statistics.median(method.seconds)
            matmul_seconds, operations = product_seconds(method.step)
            rows.append(
                {
                    "kind": "benchmark_fit",
                    "prompts": prompts,
                    "method": method.name,
                    "backend": method.backend,
                    "n_problems": method.n_problems,
                    "mean_prompt_tokens": n_tokens,
                    "answer_tokens": sum(len(e.answer) for e in examples),
                    "seconds_per_problem_step": seconds,
                    "speedup_over_plain_hooked": reference["hooked"] / seconds,
                    "speedup_over_plain_bridge": reference["bridge"] / seconds,
                    "matmul_share": matmul_seconds / (seconds * method.n_problems),
                    "gflops": operations / (seconds * method.n_problems) / 1e9,
                    "matmul_gflops": operations / matmul_seconds / 1e9,
                    "peak_mb": peak_megabytes(method.step),
                    "threads": torch.get_num_threads(),
                    "cpu": CPU,
                    "model": MODEL,
                    "layer": LAYER,
                    "n_examples": N,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one row a line")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed steps of each method")
    parser.add_argument("--out", type=Path, default=OUT, help="where the rows go")
    parser.add_argument("--from-rows", action="store_true", help="print the rows on disk only")
    arguments = parser.parse_args()
    if not arguments.from_rows:
        rows = benchmark(arguments.rounds)
        others = read_rows(arguments.out) if arguments.out.exists() else []
        write_rows(arguments.out, [*(row for row in others if row["cpu"] != CPU), *rows])
    else:
        rows = read_rows(arguments.out)
    if arguments.json:
        print("".join(json.dumps(row) + "\n" for row in rows), end="")
        return
    header = ("CPU", "prompts", "method", "model class", "over plain HookedTransformer")
    header += ("over plain Bridge", "matrix products' share", "GFLOP/s", "peak MB")
    lines = [
        (
            *(row["cpu"], row["prompts"], row["method"], row["backend"]),
            f"{row['speedup_over_plain_hooked']:.1f}x",
            f"{row['speedup_over_plain_bridge']:.1f}x",
            f"{row['matmul_share']:.0%}",
            f"{row['gflops']:.0f} of {row['matmul_gflops']:.0f}",
            f"{row['peak_mb']:.0f}",
        )
        for row in rows
    ]
    print(markdown(header, lines))


if __name__ == "__main__":
    main()

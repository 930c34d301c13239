"""One step of a fit: the plain loop of a TransformerLens user against the engine, in one run.

    python experiments/benchmark_fit.py            # tables
    python experiments/benchmark_fit.py --json     # one row a line
    python experiments/benchmark_fit.py --device cuda --dtype bfloat16
    python experiments/benchmark_fit.py --from-rows  # print the rows on disk only

A step is one loss and gradient of one problem: N examples, Delta at one layer. All methods are
first checked to give the same loss and gradient, then timed in alternation; pyvene's trainable
intervention is one of them where that library is installed (`pip install pyvene`).
`matmul_share` is the time of a step's matrix products alone (the same shapes, timed in the same
run) over the time of the step. Peak memory is what a step adds to the loaded models; on a GPU,
where the engine replays a recorded step, what its first steps and the recording add.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import WARM_UP, Step, hardware, peak_megabytes, product_seconds, timed
from pyvene_step import INSTALLED, pyvene_step
from tables import MORE, markdown

from tl_laai.engine import Engine
from tl_laai.models import load_model
from tl_laai.prefix import freeze
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
N_PROBLEMS = {"cpu": (1, 16), "cuda": (1, 16, 128)}
ROUNDS = 3
# How far loss and gradient may be from those of the plain loop on the Bridge, relative.
TOLERANCES = {"float32": (1e-4, 1e-3), "bfloat16": (0.05, 0.3)}
OUT = Path(__file__).parent.parent / "figures" / "benchmark_fit.jsonl"


@dataclass
class Method:
    """One way to take a step, which returns the first problem's loss and gradient."""

    name: str
    backend: str
    n_problems: int
    prepare: Callable[[], Step]
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.step = self.prepare()


def plain_step(model: Any, examples: tuple[TokenisedExample, ...], delta: torch.Tensor) -> Step:
    """`run_with_hooks` over whole prompts, right-padded (harmless under a causal mask)."""
    device = next(model.parameters()).device
    delta = delta.to(device)
    rows = [[*e.prompt, *e.answer[:-1]] for e in examples]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    ends = torch.tensor([len(e.prompt) - 1 for e in examples], device=device)
    batch = torch.arange(len(rows), device=device)
    answers = [torch.tensor(e.answer, device=device) for e in examples]

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        leaf = delta.clone().requires_grad_()

        def add(z: torch.Tensor, hook: Any) -> torch.Tensor:
            z = z.clone()
            z[batch, ends] = z[batch, ends] + leaf.to(z.dtype)
            return z

        hooks = [(f"blocks.{LAYER}.attn.hook_z", add)]
        logits = model.run_with_hooks(
            tokens, fwd_hooks=hooks, attention_mask=torch.ones_like(tokens), return_type="logits"
        )
        losses = []
        for i, (example, answer) in enumerate(zip(examples, answers, strict=True)):
            end = len(example.prompt) - 1
            at = logits[i, end : end + len(answer)]
            losses.append(torch.nn.functional.cross_entropy(at, answer))
        loss = torch.stack(losses).mean()
        loss.backward()
        return loss.detach(), leaf.grad

    return step


def engine_step(
    model: Any, examples: tuple[TokenisedExample, ...], delta: torch.Tensor, n_problems: int
) -> Step:
    engine = Engine(
        freeze(model, examples), layers=[LAYER] * n_problems, rows=[range(N)] * n_problems
    )
    deltas = torch.stack([delta * (1 + i / n_problems) for i in range(n_problems)])
    problems = torch.arange(n_problems)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        loss, gradient = engine.value_and_grad(deltas, problems)
        return loss[0], gradient[0]

    return step


def as_hugging_face_loads(dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    from tl_laai.checkpoints import find_source

    folder = find_source(MODEL).folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).requires_grad_(False)


def as_transformer_lens_loads(backend: str, device: str, dtype: torch.dtype) -> Any:
    """The model as TransformerLens itself loads it: no memory layout of ours."""
    from transformers import AutoTokenizer

    from tl_laai.checkpoints import find_source

    source = find_source(MODEL)
    hf = as_hugging_face_loads(dtype).to(device)
    tokenizer = AutoTokenizer.from_pretrained(source.folder)
    if backend == "hooked":
        from transformer_lens import HookedTransformer

        model: Any = HookedTransformer.from_pretrained(
            source.official_name, hf_model=hf, tokenizer=tokenizer, device=device, dtype=dtype
        )
    else:
        from transformer_lens.model_bridge import TransformerBridge

        model = TransformerBridge.boot_transformers(
            str(source.folder), hf_model=hf, tokenizer=tokenizer, device=device, dtype=dtype
        )
    return model.requires_grad_(False)


def benchmark(rounds: int, device: str, dtype_name: str) -> list[dict[str, Any]]:
    dtype = getattr(torch, dtype_name)
    plain = {b: as_transformer_lens_loads(b, device, dtype) for b in ("hooked", "bridge")}
    ours = {b: load_model(MODEL, backend=b, device=device, dtype=dtype) for b in plain}
    hugging_face = as_hugging_face_loads(dtype) if INSTALLED and device == "cpu" else None
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
        methods = [
            Method(f"plain-{b}", b, 1, partial(plain_step, plain[b], examples, delta))
            for b in plain
        ]
        if hugging_face is not None:
            prepare = partial(pyvene_step, hugging_face, examples, LAYER, delta)
            methods.append(Method("pyvene", "hugging-face", 1, prepare))
        for backend, model in ours.items():
            for n in N_PROBLEMS[device]:
                prepare = partial(engine_step, model, examples, delta, n)
                methods.append(Method(f"engine-{n}", backend, n, prepare))
        for _ in range(WARM_UP if device != "cpu" else 0):
            for method in methods:
                method.step()
        _check_alike(methods, TOLERANCES[dtype_name])
        for _ in range(rounds):
            for method in methods:
                method.seconds.append(timed(method.step, device) / method.n_problems)
        reference = {
            m.backend: statistics.median(m.seconds) for m in methods if m.name.startswith("plain")
        }
        n_tokens = statistics.mean(len(e.prompt) for e in examples)
        for method in methods:
            seconds = statistics.median(method.seconds)
            matmul_seconds, operations = product_seconds(method.prepare(), device)
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
                    "peak_mb": peak_megabytes(method.prepare, device),
                    "threads": torch.get_num_threads(),
                    "hardware": hardware(device),
                    "dtype": dtype_name,
                    "model": MODEL,
                    "layer": LAYER,
                    "n_examples": N,
                }
            )
    return rows


def _check_alike(methods: list[Method], tolerances: tuple[float, float]) -> None:
    """Leave where a method's loss or gradient is not that of the plain loop on the Bridge."""
    loss, gradient = methods[1].step()
    for method in methods:
        other_loss, other = method.step()
        off = float((other.to(gradient) - gradient).norm() / gradient.norm())
        loss_off = abs(float(other_loss) / float(loss) - 1)
        if not (loss_off < tolerances[0] and off < tolerances[1]):
            sys.exit(
                f"{method.name} on {method.backend}: loss off by {loss_off:.1e}, gradient by "
                f"{off:.1e}"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one row a line")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="timed steps of each method")
    parser.add_argument("--device", choices=N_PROBLEMS, default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCES, default="float32", help="of the weights")
    parser.add_argument("--out", type=Path, default=OUT, help="where the rows go")
    parser.add_argument("--from-rows", action="store_true", help="print the rows on disk only")
    arguments = parser.parse_args()
    if not arguments.from_rows:
        own = (hardware(arguments.device), arguments.dtype)
        rows = benchmark(arguments.rounds, arguments.device, arguments.dtype)
        others = read_rows(arguments.out) if arguments.out.exists() else []
        others = [row for row in others if (row["hardware"], row["dtype"]) != own]
        write_rows(arguments.out, [*others, *rows])
    else:
        rows = read_rows(arguments.out)
    if arguments.json:
        print("".join(json.dumps(row) + "\n" for row in rows), end="")
        return
    print(markdown(*_compared(rows)))
    print(MORE)
    header = ("hardware", "prompts", "method", "model class", "over plain HookedTransformer")
    header += ("over plain Bridge", "matrix products' share", "GFLOP/s", "peak MB")
    lines = [
        (
            *(_place(row), row["prompts"], row["method"], row["backend"]),
            f"{row['speedup_over_plain_hooked']:.1f}x",
            f"{row['speedup_over_plain_bridge']:.1f}x",
            f"{row['matmul_share']:.0%}",
            f"{row['gflops']:.0f} of {row['matmul_gflops']:.0f}",
            f"{row['peak_mb']:.0f}",
        )
        for row in rows
    ]
    print(markdown(header, lines))


def _place(row: dict[str, Any]) -> str:
    return f"{row['hardware']}, {row['dtype']}"


def _compared(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and lines of a table with a column for each hardware and dtype."""
    places = list(dict.fromkeys(map(_place, rows)))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        ratios = (row["speedup_over_plain_hooked"], row["speedup_over_plain_bridge"])
        over = " / ".join(f"{ratio:.{0 if ratio >= 100 else 1}f}x" for ratio in ratios)
        of = (row["prompts"], row["method"], row["backend"])
        cells.setdefault(of, {})[_place(row)] = f"{over} ({row['matmul_share']:.0%})"
    order = {
        method: i for i, method in enumerate(("plain", "pyvene", "engine-1", "engine-16", "engine"))
    }

    def rank(of: tuple[str, ...]) -> tuple[Any, ...]:
        method = of[1] if of[1] in order else of[1].split("-")[0]
        return list(SHOTS).index(of[0]), order[method], of[2] == "bridge"

    lines = [
        (*of, *(cells[of].get(place, "-") for place in places)) for of in sorted(cells, key=rank)
    ]
    return ("prompts", "method", "model class", *places), lines


if __name__ == "__main__":
    main()

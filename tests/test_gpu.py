"""On a GPU everything gives what it gives on the CPU, recorded as a CUDA graph or not.

In float32, since the tiny models keep float64 on the CPU alone.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import tiny
import torch
from heads import draw, slow_logits
from methods_on_tiny import EXAMPLES
from test_devices import results
from torch import Tensor

from tl_laai.baselines import METHODS
from tl_laai.batches import FitBatch, FitProblem
from tl_laai.distillation import Distillation, prepare
from tl_laai.edits import Edit
from tl_laai.engine import Engine
from tl_laai.evaluation import evaluate_edits
from tl_laai.finetuning import fine_tune
from tl_laai.models import load_model
from tl_laai.opinions import OptionExample
from tl_laai.prefix import freeze
from tl_laai.problems import engine_for
from tl_laai.prompts import PromptTemplate
from tl_laai.recording import CALLS_BEFORE
from tl_laai.tasks import Example, Task
from tl_laai.vocabulary import cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")

FAMILIES = [
    *(("hooked", family) for family in tiny.FAMILIES if tiny.HAS_HOOKED),
    *(("bridge", family) for family in (*tiny.FAMILIES, "gemma2", "gptj", "opt")),
]


def on_cpu(backend: str, family: str, dtype: torch.dtype = torch.float32) -> Any:
    return tiny.tiny_model(backend, family, dtype=dtype)


def on_gpu(backend: str, family: str, dtype: torch.dtype = torch.float32) -> Any:
    return on_cpu(backend, family, dtype).to("cuda")


def two_problems(model: Any) -> Engine:
    prompts = freeze(model, oracle.random_examples(oracle.LENGTHS))
    return Engine(prompts, layers=[0, 1], rows=[[0, 1, 2], [1, 3]])


@pytest.mark.parametrize(("backend", "family"), FAMILIES)
def test_a_gpu_gives_what_a_cpu_gives(backend: str, family: str) -> None:
    expected = results(on_cpu(backend, family))
    found = results(on_gpu(backend, family))
    for name, tensors in expected.items():
        for one, two in zip(tensors, found[name], strict=True):
            torch.testing.assert_close(two.cpu(), one, rtol=1e-3, atol=1e-3, msg=name)


@pytest.mark.parametrize(("backend", "family"), FAMILIES)
def test_recorded_evaluations_give_what_the_cpu_gives(backend: str, family: str) -> None:
    engine = two_problems(on_gpu(backend, family))
    twin = two_problems(on_cpu(backend, family))
    shape = (2, engine.prompts.backend.n_heads, engine.prompts.backend.d_head)
    both = torch.arange(2)
    for _ in range(CALLS_BEFORE + 3):
        deltas = torch.randn(shape)
        for one, two in zip(
            twin.value_and_grad(deltas, both), engine.value_and_grad(deltas, both), strict=True
        ):
            torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)
    assert all(plan._replayed.is_recorded for plan in engine.plans([0, 1]))


def test_every_objective_is_recorded() -> None:
    model = on_gpu("bridge", "llama")
    opinion = OptionExample("ab:", ("x", "y"), (0.3, 0.7), outside_weight=1.0)
    lesson = prepare(
        model,
        (Example("ab", "x"), Example("c", "yz")),
        Distillation(inputs=("f", "gh"), label_share=0.5),
        template=PromptTemplate(text="{input}>", answer_prefix="", separator=";", answer_end="."),
    )
    for examples in ((opinion,), lesson.examples):
        engine = engine_for(model, [examples], layers=[1])
        zero = torch.zeros(1, engine.prompts.backend.n_heads, engine.prompts.backend.d_head)
        for _ in range(CALLS_BEFORE + 2):
            engine.value_and_grad(zero, torch.tensor([0]))
        assert all(plan._replayed.is_recorded for plan in engine.plans([0]))


def test_logits_outside_the_range_of_sums_are_taken_anew() -> None:
    model, twin = on_gpu("bridge", "llama"), on_cpu("bridge", "llama")
    for one in (model, twin):
        one.unembed.original_component.weight.data *= 300
    engine, slow = two_problems(model), two_problems(twin)
    shape = (2, engine.prompts.backend.n_heads, engine.prompts.backend.d_head)
    for _ in range(CALLS_BEFORE + 2):
        deltas = torch.randn(shape)
        (loss, gradient), expected = (
            e.value_and_grad(deltas, torch.arange(2)) for e in (engine, slow)
        )
        assert bool(loss.isfinite().all())
        torch.testing.assert_close(loss, expected[0], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-3, atol=1e-2)


def test_losses_of_bfloat16_weights_are_float32() -> None:
    wide = two_problems(on_gpu("bridge", "llama"))
    half = two_problems(on_gpu("bridge", "llama", torch.bfloat16))
    zero = torch.zeros(2, wide.prompts.backend.n_heads, wide.prompts.backend.d_head)
    loss, gradient = half.value_and_grad(zero, torch.arange(2))
    expected, slope = wide.value_and_grad(zero, torch.arange(2))
    assert loss.dtype == gradient.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.03, atol=0)
    cosine = torch.nn.functional.cosine_similarity(gradient.flatten(1), slope.flatten(1))
    assert bool((cosine > 0.95).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_not_rounded(dtype: torch.dtype) -> None:
    hidden, weight, targets, bias = (t.to("cuda") for t in draw(6, 700, 64, dtype=dtype))
    found = cross_entropy(hidden, weight, targets, bias=bias)
    wide = slow_logits(hidden.double(), weight.double(), bias.double(), None)
    expected = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)


def tensors(edit: Edit) -> list[Tensor]:
    kinds = (edit.deltas, edit.scale, edit.residual, edit.replace)
    return [kind[layer] for kind in kinds for layer in sorted(kind)]


@pytest.mark.parametrize("name", METHODS)
def test_baselines_on_a_gpu_are_those_of_the_cpu(name: str) -> None:
    method, (cpu, gpu) = METHODS[name], (on_cpu("bridge", "llama"), on_gpu("bridge", "llama"))
    setting = method.grid(cpu)[:1]
    (one,), (two,) = (method.candidates(model, EXAMPLES, setting).values() for model in (cpu, gpu))
    for expected, found in zip(tensors(one), tensors(two), strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-4)
    rows = [evaluate_edits(m, EXAMPLES, {"it": e})["it"].rows for m, e in ((cpu, one), (gpu, two))]
    assert [row.prediction for row in rows[1]] == [row.prediction for row in rows[0]]


def test_fine_tuning_on_a_gpu_is_that_of_the_cpu() -> None:
    options: Any = {"learning_rate": 0.01, "steps": 3}
    one, two = (
        fine_tune(
            model,
            EXAMPLES,
            hf_model=tiny.tiny_hf("llama", dtype=torch.float32).to(where),
            **options,
        )
        for model, where in (
            (on_cpu("bridge", "llama"), "cpu"),
            (on_gpu("bridge", "llama"), "cuda"),
        )
    )
    torch.testing.assert_close(
        torch.tensor(two.losses), torch.tensor(one.losses), rtol=1e-3, atol=0
    )
    found, expected = (fitted.evaluate(EXAMPLES).rows for fitted in (two, one))
    assert [row.prediction for row in found] == [row.prediction for row in expected]


def packaged(device: str, dtype: torch.dtype) -> Any:
    try:
        return load_model("gemma-3-270m", device=device, dtype=dtype)
    except ValueError as error:
        pytest.skip(f"the packaged model is not here: {error}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packaged_model_fits_on_a_gpu_as_on_the_cpu(dtype: torch.dtype) -> None:
    train = Task.load("country-capital").split(train=10, test=10, seed=0).train
    problem = FitProblem(train, 9, alpha=0.9)
    cpu = FitBatch(packaged("cpu", torch.float32), [problem])
    gpu = FitBatch(packaged("cuda", dtype), [problem])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    expected: list[Tensor] = list(cpu.engine.value_and_grad(cpu.zero, cpu.everyone))
    found = list(gpu.engine.value_and_grad(gpu.zero, gpu.everyone))
    for one, two in zip(expected, found, strict=True):
        assert float((two - one).norm() / one.norm()) < tolerance
    (one,), (two,) = (b.solve(max_evaluations=40) for b in (cpu, gpu))
    assert two.status is one.status
    assert abs(two.objective - one.objective) < tolerance * one.objective

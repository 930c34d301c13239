"""Rules: exact match of fits, prompting, other interventions, fine-tuning and controls.

    python experiments/table_rules.py                       # all groups of methods; resumes
    python experiments/table_rules.py --groups fits         # one group
    python experiments/table_rules.py --from-rows           # print the table only
    python experiments/table_rules.py --from-rows --seeds 0 --tasks antonym  # of some rows

Ten training examples, zero-shot prompts for every intervention, 100 held-out examples, five
seeds. Whatever a method chooses, it chooses by cross-validation inside the ten, but for the layer
of distilled fits, which the teacher's answers to held-out inputs choose. The inputs that
the model makes up for distillation may be among the held-out ones, without their labels: rows say
how many were (`n_test_made_up`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from common import FIGURES, RULES, parser, tasks
from rules_shown import N_TEST, N_TRAIN, show
from tables import (
    ALPHA,
    CHOOSING_EVALUATIONS,
    HALF_ALPHAS,
    LABEL_SHARE,
    MODEL,
    N_FOLDS,
    TAUGHT,
    TAUGHT_STEPS,
    TEACHER_STEPS,
    Row,
    answer_row,
    described,
    distilling,
    finetuning,
    layers_of,
    resume,
    search,
    unit,
    zeros,
)

from tl_laai.rows import read_rows

SEEDS = (0, 1, 2, 3, 4)
WEAKER_ALPHAS = (0.9, 0.5, 0.25, 0.1, 0.05)
NAME = "table_rules"


def fits(model: Any, data: Any, seed: int) -> list[Row]:
    """Prompting, fits with and without penalty, and controls of the relaxed fit."""
    from tl_laai import FitProblem, evaluate, fit_auto, fit_many
    from tl_laai.candidates import Candidate
    from tl_laai.controls import permuted_heads, random_direction, shuffled_answers
    from tl_laai.edits import Edit
    from tl_laai.evaluation import as_edit, evaluate_edits
    from tl_laai.selection import PRESETS
    from tl_laai.side_effects import next_token_kl

    choose = partial(fit_auto, model, data.train, **search(seed))
    labelled = choose(layers=layers_of(model), alphas=(ALPHA, 0.0))
    relaxed, free = (
        max((c for c in labelled.table if c.alpha == alpha), key=Candidate.score)
        for alpha in (ALPHA, 0.0)
    )
    paper = fit_auto(
        model,
        data.train,
        layers=[relaxed.layer],
        alphas=(0.9, 0.5),
        n_folds=N_FOLDS,
        seed=seed,
        **PRESETS["paper"],
    )

    def refit(c: Candidate, examples: Any = data.train) -> Any:
        problem = FitProblem(examples, c.layer, None, c.alpha)
        options = {"relax_steps": c.relax_steps, "max_evaluations": CHOOSING_EVALUATIONS}
        return fit_many(model, [problem], **options)[0]

    found = {
        "penalised": (paper.fit, paper.candidate),
        "relaxed": (labelled.fit if labelled.candidate is relaxed else refit(relaxed), relaxed),
        "unregularised": (labelled.fit if labelled.candidate is free else refit(free), free),
        "shuffled answers": (refit(relaxed, shuffled_answers(data.train, seed)), relaxed),
    }
    edits = {"zero-shot": Edit()}
    edits |= {name: as_edit(model, f.intervention) for name, (f, _) in found.items()}
    edits["random direction"] = random_direction(edits["relaxed"], seed)
    edits["permuted heads"] = permuted_heads(edits["relaxed"], seed)
    answered = evaluate_edits(model, data.test, edits)
    answered["few-shot"] = evaluate(model, data.test, demonstrations=data.train)
    moved = next_token_kl(model, edits)
    rows = []
    for name, score in answered.items():
        fitted, chosen = found.get(name, (None, None))
        more = {} if fitted is None else _of_fit(fitted)
        if name in moved:
            more["kl_unrelated"] = float(moved[name].mean())
        if chosen is labelled.candidate and name != "shuffled answers":
            more["validation"] = _validation(labelled.held_out)
        rows.append(answer_row(name, score, "" if chosen is None else described(chosen), **more))
    return rows


def weaker(model: Any, data: Any, seed: int) -> list[Row]:
    """The paper's objective with more penalties to choose from, at the layer of `relaxed`."""
    from tl_laai import fit_auto
    from tl_laai.selection import PRESETS

    chosen = fit_auto(
        model,
        data.train,
        layers=[_layer_of("relaxed", data, seed)],
        alphas=WEAKER_ALPHAS,
        n_folds=N_FOLDS,
        seed=seed,
        **PRESETS["paper"],
    )
    return [_fitted_row("penalised, weaker", model, data, chosen)]


def preset(name: str, model: Any, data: Any, seed: int) -> list[Row]:
    """`fit_auto` as it is called: its own layers, penalties, steps and folds."""
    from tl_laai import fit_auto
    from tl_laai.selection import PRESETS

    chosen = fit_auto(model, data.train, seed=seed, **PRESETS[name])
    return [_fitted_row(f"preset {name}", model, data, chosen)]


def half(model: Any, data: Any, seed: int) -> list[Row]:
    """Relaxed fits on at most half of the heads of the layer that does best on all."""
    return [_half("relaxed, half", model, data, **search(seed))]


def distilled_half(model: Any, data: Any, seed: int) -> list[Row]:
    """The same of distilled fits."""
    return [_half("distilled, half", model, data, **distilling(seed))]


def _half(method: str, model: Any, data: Any, **settings: Any) -> Row:
    from tl_laai import fit_auto

    chosen = fit_auto(
        model,
        data.train,
        layers=layers_of(model),
        alphas=HALF_ALPHAS,
        max_heads=model.cfg.n_heads // 2,
        max_evaluations=CHOOSING_EVALUATIONS,
        **settings,
    )
    return _fitted_row(method, model, data, chosen)


def distilled(model: Any, data: Any, seed: int) -> list[Row]:
    """Distillation, its layer by what the teacher says to held-out inputs; how good a teacher."""
    from tl_laai import fit_auto
    from tl_laai.distillation import ask_teacher

    options = distilling(seed)
    chosen = fit_auto(model, data.train, layers=layers_of(model), **options)
    validation = _validation(ask_teacher(model, data.train, settings=options["distillation"]))
    return [_fitted_row("distilled", model, data, chosen, validation=validation)]


def fitted_teacher(model: Any, data: Any, seed: int) -> list[Row]:
    """The same from a teacher that is fitted on the ten itself; what that teacher answers."""
    from tl_laai import fit_auto
    from tl_laai.distillation import ask_teacher
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.splits import cross_validation_folds
    from tl_laai.teachers import fit_teacher

    options = distilling(seed, TEACHER_STEPS)
    chosen = fit_auto(model, data.train, layers=layers_of(model), **options)
    folds = cross_validation_folds(data.train, N_FOLDS, seed)
    held_out = ask_teacher(model, data.train, folds=folds, settings=options["distillation"])
    edit = fit_teacher(model, data.train, steps=TEACHER_STEPS, seed=seed)
    itself = evaluate_edits(model, data.test, {"it": edit}, demonstrations=data.train)["it"]
    return [
        _fitted_row(TAUGHT, model, data, chosen, validation=_validation(held_out)),
        answer_row("few-shot, fitted", itself),
    ]


def distilled_every_step(model: Any, data: Any, seed: int) -> list[Row]:
    """The same with Delta added at every token that answers, not at the first alone."""
    from tl_laai import fit_auto

    options = distilling(seed) | {"position": "every_step"}
    chosen = fit_auto(model, data.train, layers=layers_of(model), **options)
    return [_fitted_row("distilled, every step", model, data, chosen)]


def _fitted_row(method: str, model: Any, data: Any, chosen: Any, **more: Any) -> Row:
    from tl_laai.evaluation import as_edit, evaluate_edits
    from tl_laai.side_effects import next_token_kl

    edits = {method: as_edit(model, chosen.fit.intervention)}
    more |= _of_fit(chosen.fit)
    more["kl_unrelated"] = float(next_token_kl(model, edits)[method].mean())
    if chosen.objective == "distill":
        more["n_test_made_up"] = _made_up(chosen.fit.intervention.provenance, data.test)
    score = evaluate_edits(model, data.test, edits)[method]
    return answer_row(method, score, described(chosen.candidate), **more)


def _validation(held_out: Any) -> list[float]:
    """How examples of the ten were answered that were held out: share right, probability."""
    return [held_out.exact_match, held_out.probability]


def _made_up(provenance: Any, test: Any) -> int:
    """How many held-out inputs the model made up itself, and was taught on without their labels."""
    from tl_laai.tasks import same_input_key

    known = {same_input_key(text) for text in provenance["objective"]["inputs"]}
    return sum(same_input_key(e.input) in known for e in test)


def _of_fit(fitted: Any) -> Row:
    return {
        "status": fitted.solution.status.value,
        "n_heads": zeros(fitted)["n_heads"],
        "layer": fitted.layer,
        "norm": float(fitted.solution.delta.norm()),
    }


def vectors(model: Any, data: Any, seed: int) -> list[Row]:
    """Other activation interventions, each tuned by the same cross-validation."""
    from tl_laai.baselines import METHODS, tune
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.side_effects import next_token_kl

    tuned = {name: tune(model, data.train, m, seed=seed) for name, m in METHODS.items()}
    edits = {name: t.edit for name, t in tuned.items()}
    scores = evaluate_edits(model, data.test, edits)
    moved = next_token_kl(model, edits)
    return [
        answer_row(name, scores[name], str(t.setting), kl_unrelated=float(moved[name].mean()))
        for name, t in tuned.items()
    ]


def begun(model: Any, data: Any, seed: int) -> list[Row]:
    """The task vector asked for less: that its answer begins right, wherever it ends.

    Fits, learnt heads and fine-tuning are taught the line break that ends an answer; what is read
    off activations is not. It is tuned without the line break here.
    """
    return _begun(["task-vector"], model, data, seed)


def begun_others(model: Any, data: Any, seed: int) -> list[Row]:
    """The same of the other interventions that are read off activations."""
    from tl_laai.baselines import METHODS

    names = [name for name in METHODS if name not in ("task-vector", "learnt-heads")]
    return _begun(names, model, data, seed)


def _begun(names: Sequence[str], model: Any, data: Any, seed: int) -> list[Row]:
    from dataclasses import replace

    from tl_laai.baselines import METHODS, tune
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.metrics import begins_with
    from tl_laai.prompts import DEFAULT_TEMPLATE

    endless = replace(DEFAULT_TEMPLATE, answer_end="")
    tuned = {
        name: tune(model, data.train, METHODS[name], seed=seed, template=endless) for name in names
    }
    scores = evaluate_edits(model, data.test, {name: t.edit for name, t in tuned.items()})
    rows = []
    for name, score in scores.items():
        correct = [int(begins_with(row.prediction, row.target)) for row in score.rows]
        row = answer_row(f"{name}, begins right", score, str(tuned[name].setting))
        rows.append(row | {"exact_match": score.begins_right, "correct": correct})
    return rows


def taught_heads(model: Any, data: Any, seed: int) -> list[Row]:
    """Learnt head offsets that learn from a fitted teacher's answers too.

    On offer is what they chose with labels alone on seed 0, on all tasks but synonym.
    """
    from tl_laai.baselines import tune
    from tl_laai.evaluation import evaluate_edits
    from tl_laai.head_vectors import LearntHeads
    from tl_laai.side_effects import next_token_kl

    name, method = "learnt-heads, taught", LearntHeads((12, 36), (0.03,))
    tuned = tune(model, data.train, method, seed=seed, augment=_taught(model, data, seed))
    score = evaluate_edits(model, data.test, {name: tuned.edit})[name]
    moved = next_token_kl(model, {name: tuned.edit})[name]
    return [answer_row(name, score, str(tuned.setting), kl_unrelated=float(moved.mean()))]


def taught_finetuning(method: str, model: Any, data: Any, seed: int) -> list[Row]:
    """LoRA or IA3 that does so; a step sees 16 of some 124 examples."""
    learning = {"augment": _taught(model, data, seed), "steps": (20, 40)}
    return finetuning(model, data, seed, methods=[method], suffix=", taught", **learning)


def taught_fits(model: Any, data: Any, seed: int) -> list[Row]:
    """Delta on the same examples: the teacher's words, where distilled fits learn what it thinks.

    Layer and steps are those of the distilled fit.
    """
    from collections import Counter

    from tl_laai import FitProblem, evaluate, fit_many

    learnt = Counter(_taught(model, data, seed)(data.train))
    weights = [float(n) for n in learnt.values()]
    problem = FitProblem([*learnt], _layer_of(TAUGHT, data, seed), weights=weights)
    [fitted] = fit_many(model, [problem], solver="adam", max_evaluations=TAUGHT_STEPS)
    score = evaluate(model, data.test, intervention=fitted.intervention)
    return [answer_row("fitted, taught", score, f"layer {fitted.layer}", **_of_fit(fitted))]


def taught_layer(model: Any, data: Any, seed: int) -> list[Row]:
    """Labels alone at the layer that the teacher's answers chose."""
    from tl_laai import fit_auto

    layer = _layer_of(TAUGHT, data, seed)
    chosen = fit_auto(model, data.train, layers=[layer], alphas=(0.0,), **search(seed))
    return [_fitted_row("unregularised, taught layer", model, data, chosen)]


def _layer_of(method: str, data: Any, seed: int) -> int:
    """The layer that a method chose, from its row."""
    rows = read_rows(FIGURES / f"{NAME}.jsonl")
    unit = (method, data.task.name, seed)
    found = [row for row in rows if (row["method"], row["task"], row["seed"]) == unit]
    if not found:
        raise ValueError(f"{NAME}.jsonl has no row of {unit}: run the group that writes it first")
    return int(found[-1]["layer"])


def _taught(model: Any, data: Any, seed: int) -> Callable[[Sequence[Any]], list[Any]]:
    """From labelled examples to those and a fitted teacher's answers to inputs that are made up.

    Teacher, inputs and the labels' share are those of distilled fits; its answers are labels here
    (sequence-level distillation, Kim & Rush 2016), not distributions. A fold's teacher knows the
    fold's training part alone, but the inputs are made up once, from all ten.
    """
    from functools import cache

    from tl_laai import Example
    from tl_laai.distillation import teach
    from tl_laai.made_up_inputs import make_up_inputs
    from tl_laai.prompts import decoded_answer

    settings = distilling(seed, TEACHER_STEPS)["distillation"].on(model)
    inputs = make_up_inputs(model, data.train, settings.n_inputs, seed=seed)

    @cache
    def learn_from(labelled: tuple[Any, ...]) -> list[Any]:
        said = [example.tokens for example in teach(model, inputs, labelled, settings)]
        texts = [model.tokenizer.decode(list(tokens.answer)) for tokens in said]
        # An answer that was cut off has no line break, and would be taught one; an empty one is
        # no label.
        answered = [
            Example(tokens.input, answer)
            for tokens, text in zip(said, texts, strict=True)
            if "\n" in text and (answer := decoded_answer(text))
        ]
        n_copies = round(LABEL_SHARE / (1 - LABEL_SHARE) * len(answered) / len(labelled))
        return [*answered, *labelled * max(1, n_copies)]

    return lambda labelled: learn_from(tuple(labelled))


GROUPS: dict[str, Callable[[Any, Any, int], list[Row]]] = {
    "fits": fits,
    "weaker": weaker,
    "preset paper": partial(preset, "paper"),
    "preset relaxed": partial(preset, "relaxed"),
    "preset distill": partial(preset, "distill"),
    "half": half,
    "distilled": distilled,
    "fitted teacher": fitted_teacher,
    "distilled every step": distilled_every_step,
    "distilled half": distilled_half,
    "vectors": vectors,
    "begun": begun,
    "begun others": begun_others,
    "finetuning": finetuning,
    "taught layer": taught_layer,
    "taught fits": taught_fits,
    "taught heads": taught_heads,
    "taught lora": partial(taught_finetuning, "lora"),
    "taught ia3": partial(taught_finetuning, "ia3"),
}


def compute(groups: list[str], names: list[str], seeds: list[int], device: str) -> None:
    from tl_laai import load_model
    from tl_laai.recipes import draw

    model = load_model(MODEL, device=device)
    jobs = []
    for seed in seeds:
        for task in tasks(names):
            for group in groups:
                data = draw(task, train=N_TRAIN, test=N_TEST, seed=seed)
                shared = unit(task, seed, group, device) | {"n_train": N_TRAIN}
                jobs.append((shared, partial(GROUPS[group], model, data, seed)))
    resume(NAME, ("model", "task", "seed", "group", "digest"), jobs)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    options.add_argument("--tasks", nargs="+", default=list(RULES), metavar="TASK")
    options.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    options.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="rows say which")
    arguments = options.parse_args()
    if not arguments.from_rows:
        compute(arguments.groups, arguments.tasks, arguments.seeds, arguments.device)
    rows = read_rows(FIGURES / f"{NAME}.jsonl")
    of_seeds = [row for row in rows if row["seed"] in arguments.seeds]
    show([row for row in of_seeds if row["task"] in arguments.tasks])


if __name__ == "__main__":
    main()

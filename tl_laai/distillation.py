"""Distillation from context: the model's own few-shot behaviour teaches its zero-shot self.

The teacher reads solved examples in its prompt, answers an input greedily, and gives its
next-token distributions p along that answer. Delta is fitted so that the bare prompt gives them:

    mean over answer tokens t of  KL( p_t || model(bare prompt + Delta, answer so far) )

No labels are needed beyond those of the solved examples, and the inputs can come from the model
itself, by letting it continue the few-shot prompt: ten labelled examples are all that it takes.
Several teachers, each with the examples in another order, can be averaged; and a teacher can be
fitted on the labels itself before it is asked (`Distillation.teacher_steps`, `tl_laai.teachers`).

The objective is ours, not the paper's (context distillation: Askell et al. 2021; Snell, Klein &
Zhong 2022). It comes near to the teacher and no nearer to the task, which is why the labelled
answers may have a share in it too (`Distillation.label_share`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_laai.backends import own_modes
from tl_laai.decoding import answer_hidden, decode, longest_answer
from tl_laai.distributions import Distributions, NothingTaughtError, mean_distribution
from tl_laai.edits import Edit
from tl_laai.evaluation import AnswerRow, Evaluation, evaluate_edits
from tl_laai.made_up_inputs import make_up_inputs
from tl_laai.prefix import freeze
from tl_laai.prompts import (
    DEFAULT_TEMPLATE,
    PromptTemplate,
    TaughtExample,
    TokenisedExample,
    TooLongError,
    end_tokens,
    tokenise,
    tokenise_prompts,
)
from tl_laai.splits import count, seeded_order
from tl_laai.tasks import Example, same_input_key
from tl_laai.teachers import fit_teacher, teacher_layer

_LOG = logging.getLogger("tl_laai")

_TOKENS_AT_ONCE = 512
_ASKED_AT_ONCE = 64


@dataclass(frozen=True)
class Distillation:
    """What a distilled fit is made of, besides the labelled examples.

    Attributes:
        inputs: unlabelled inputs; None lets the model make them up.
        n_inputs: how many it should make up.
        label_share: weight of the labelled answers in the loss, 0 to 1; 0 leaves them out.
        n_teachers: orders of the examples over which the teacher is averaged.
        seed: of the orders and of what is made up.
        teacher_steps: steps of the teacher's own fit on the labels, behind its demonstrations
            (`teachers.fit_teacher`); 0 leaves the few-shot prompt as it is.
        teacher_layer: of that fit; None for the one after a third of the model.
        n_shown: how many of the examples all orders but the first show; None for all.
    """

    inputs: tuple[str, ...] | None = None
    n_inputs: int = 64
    label_share: float = 0.0
    n_teachers: int = 1
    seed: int = 0
    teacher_steps: int = 5
    teacher_layer: int | None = None
    n_shown: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.inputs, str):
            raise TypeError(f"inputs is {self.inputs!r}; give several, or ({self.inputs!r},)")
        for text in self.inputs or ():
            if not isinstance(text, str) or not text.strip():
                raise TypeError(f"inputs holds {text!r:.80}; give texts, without labels")
        for name in ("n_inputs", "n_teachers", "seed", "teacher_steps"):
            object.__setattr__(self, name, count(name, getattr(self, name)))
        for name in ("teacher_layer", "n_shown"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, count(name, getattr(self, name)))
        if not 0 <= self.label_share < 1:
            raise ValueError(
                f"label_share is {self.label_share}; give 0 or more and less than 1: with labels "
                "alone the objective is 'answers'"
            )
        if self.inputs is None and self.n_inputs < 1:
            raise ValueError(f"n_inputs is {self.n_inputs}; at least one must be made up")
        if self.n_teachers < 1:
            raise ValueError(f"n_teachers is {self.n_teachers}; at least one is needed")
        if self.n_shown is not None and (self.n_shown < 1 or self.n_teachers < 2):
            raise ValueError(
                f"n_shown is {self.n_shown} and n_teachers {self.n_teachers}: give 1 or more "
                "examples to show, and at least 2 teachers, for the first shows them all"
            )
        if self.inputs is not None and not self.inputs:
            raise ValueError("inputs is empty; give some, or None to let the model make them up")

    def on(self, model: Any) -> Distillation:
        """The same with the number of the teacher's layer, checked.

        Raises:
            ValueError: the model has no such layer.
        """
        return replace(self, teacher_layer=teacher_layer(model, self.teacher_layer))


@dataclass(frozen=True)
class Lesson:
    """What a fit by distillation is given.

    Attributes:
        examples: taught inputs, and the labelled examples where they have a share.
        weights: of the examples in the loss.
        inputs: the unlabelled inputs that the teacher answered.
        provenance: the settings, and what was made up, to be kept with the intervention.
    """

    examples: tuple[TaughtExample | Example, ...]
    weights: tuple[float, ...]
    inputs: tuple[str, ...]
    provenance: Mapping[str, Any]


def prepare(
    model: Any,
    examples: Sequence[Example],
    settings: Distillation | None = None,
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> Lesson:
    """Find inputs, let the teacher answer them, and weigh its answers against the labels.

    Example:
        >>> lesson = prepare(model, split.train)  # doctest: +SKIP
        >>> FitProblem(lesson.examples, layer=9, weights=lesson.weights)  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: labelled examples; the teacher reads all of them.
        settings: None for 64 inputs that the model makes up, and labels for the teacher alone.
        template: how inputs become prompts.

    Raises:
        NothingTaughtError: the model made up no input, or the teacher answered none or cannot be
            fitted (`teachers.fit_teacher`).
    """
    settings = (settings or Distillation()).on(model)
    inputs = settings.inputs
    if inputs is None:
        inputs = make_up_inputs(
            model, examples, settings.n_inputs, template=template, seed=settings.seed
        )
    taught = teach(model, inputs, examples, settings, template=template)
    return weighed(taught, examples, settings, inputs, made_up=settings.inputs is None)


def weighed(
    taught: Sequence[TaughtExample],
    examples: Sequence[Example],
    settings: Distillation,
    inputs: Sequence[str],
    *,
    made_up: bool,
) -> Lesson:
    """Taught inputs and labelled examples with the weights that `settings.label_share` says.

    Example:
        >>> half = Distillation(label_share=0.5)
        >>> weighed(taught, split.train, half, inputs, made_up=False)  # doctest: +SKIP

    Args:
        taught: what `teach` gave.
        examples: the labelled examples.
        settings: of the fit.
        inputs: what the teacher was asked.
        made_up: whether the model made them up.

    Raises:
        NothingTaughtError: `taught` is empty.
    """
    if not taught:
        raise NothingTaughtError(
            f"inputs {list(inputs)[:5]} have no answer of the teacher's, which says nothing before "
            "the end of a line; give others, or fit on the labelled answers"
        )
    share = settings.label_share
    labelled = tuple(examples) if share else ()
    return Lesson(
        (*taught, *labelled),
        (
            *[(1 - share) / len(taught)] * len(taught),
            *[share / max(1, len(labelled))] * len(labelled),
        ),
        tuple(inputs),
        {
            "objective": "distill",
            "label_share": share,
            "n_teachers": settings.n_teachers,
            "n_shown": settings.n_shown,
            "teacher_steps": settings.teacher_steps,
            "teacher_layer": settings.teacher_layer if settings.teacher_steps else None,
            "seed": settings.seed,
            "n_taught": len(taught),
            "made_up": made_up,
            "inputs": list(inputs),
        },
    )


@own_modes()
def teach(
    model: Any,
    inputs: Sequence[str],
    demonstrations: Sequence[Example],
    settings: Distillation | None = None,
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
) -> tuple[TaughtExample, ...]:
    """Let the model answer after demonstrations, and keep its distributions along the answer.

    Example:
        >>> taught = teach(model, ["Kenya", "Peru"], split.train)  # doctest: +SKIP

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        inputs: what to ask, without labels.
        demonstrations: what the teacher reads first, and is fitted on if `teacher_steps` says so.
        settings: of the teacher; None for the defaults. Of `n_teachers` orders of the
            demonstrations the first is the given one, whose greedy answer is followed; the others
            are drawn, and may show `n_shown` alone. Their distributions are averaged.
        template: how inputs become prompts.

    Returns:
        One entry for each input that has an answer: bare prompt, answer, distributions. Inputs
        behind which the longest demonstrated answer has no room are left out, with a warning.

    Raises:
        NothingTaughtError: the teacher cannot be fitted (`teachers.fit_teacher`).
        TooLongError: no input leaves room.
    """
    settings = settings or Distillation()
    orders = [tuple(demonstrations)]
    more = range(settings.n_teachers - 1)
    orders += [seeded_order(demonstrations, settings.seed + i)[: settings.n_shown] for i in more]
    edit = _teacher(model, demonstrations, settings, template)
    shown = tokenise(model, demonstrations, template=template)
    inputs = _with_room(model, inputs, orders, template, longest_answer(shown, margin=0))
    asked = [_asked(model, inputs, order, template) for order in orders]
    longest = longest_answer(shown)
    longest = min(longest, model.cfg.n_ctx - max(len(e.prompt) for own in asked for e in own))
    first = freeze(model, asked[0], share_prefix=True)
    (answers,) = decode(first, [edit], max_new_tokens=longest)
    read = model.tokenizer.decode
    # An answer cut off at the longest length did not end, so no end is taught there.
    whole = [
        answer
        if len(answer) == longest
        else (*answer, *end_tokens(model, read(list(answer)), template.answer_end))
        for answer in answers
    ]
    kept = [i for i, answer in enumerate(answers) if answer]
    if not kept:
        return ()
    hidden = torch.stack(
        [_along_answers(model, [_with(own[i], whole[i]) for i in kept], edit) for own in asked]
    )
    head = first.backend.unembedding()
    parts = [mean_distribution(part, head) for part in hidden.split(_TOKENS_AT_ONCE, dim=1)]
    distributions = Distributions.cat(parts)
    ends = list(accumulate((len(whole[i]) for i in kept), initial=0))
    bare = _asked(model, [inputs[i] for i in kept], (), template)
    return tuple(
        TaughtExample(_with(own, whole[i]), distributions[first:stop])
        for i, own, (first, stop) in zip(kept, bare, pairwise(ends), strict=True)
    )


def ask_teacher(
    model: Any,
    examples: Sequence[Example],
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    folds: Sequence[Sequence[int]] | None = None,
    settings: Distillation | None = None,
    after_fold: Callable[[], None] | None = None,
) -> Evaluation:
    """Ask each labelled example after the others: how good a teacher would be.

    A distilled fit comes near to its teacher, and asking costs far less.
    `template.answer_end` is not scored: a teacher ends answers as its demonstrations end, for
    instance with an empty line instead of a newline.

    Example:
        >>> ask_teacher(model, split.train).exact_match  # doctest: +SKIP
        0.4

    Args:
        model: a `HookedTransformer` or `TransformerBridge`; left as found.
        examples: labelled examples; each is asked after the others, in their order.
        template: how inputs become prompts.
        folds: indices of examples that are not shown to each other either, each in one fold;
            None for each by itself. A teacher that is fitted is so once a fold, on the others.
        settings: whether it is (`teacher_steps`); None for the defaults.
        after_fold: called after each.

    Returns:
        One row an example.

    Raises:
        NothingTaughtError: the teacher cannot be fitted (`teachers.fit_teacher`).
    """
    folds = [[i] for i in range(len(examples))] if folds is None else folds
    settings = settings or Distillation()
    words = replace(template, answer_end="")
    rows: dict[int, AnswerRow] = {}
    for fold in folds:
        asked = [examples[i] for i in fold]
        inputs = {same_input_key(e.input) for e in asked}
        shown = [e for e in examples if same_input_key(e.input) not in inputs]
        edit = _teacher(model, shown, settings, template)
        found = evaluate_edits(model, asked, {"it": edit}, demonstrations=shown, template=words)
        rows |= zip(fold, found["it"].rows, strict=True)
        if after_fold is not None:
            after_fold()
    return Evaluation(tuple(rows[i] for i in range(len(examples))))


def _teacher(
    model: Any, examples: Sequence[Example], settings: Distillation, template: PromptTemplate
) -> Edit:
    return fit_teacher(
        model, examples, steps=settings.teacher_steps, layer=settings.teacher_layer,
        template=template, seed=settings.seed,
    )  # fmt: skip


def _with_room(
    model: Any,
    inputs: Sequence[str],
    orders: Sequence[Sequence[Example]],
    template: PromptTemplate,
    n_answer: int,
) -> list[str]:
    """The inputs behind which, after the demonstrations in any order, so many tokens fit."""
    kept: list[str] = []
    left_out: list[str] = []
    for text in inputs:
        try:
            prompts = tokenise_prompts(model, [template.render(text, order) for order in orders])
        except TooLongError:
            prompts = ()
        room = model.cfg.n_ctx - n_answer
        fits = bool(prompts) and max(map(len, prompts)) <= room
        (kept if fits else left_out).append(text)
    if left_out:
        told = (
            f"{len(left_out)} of {len(inputs)} inputs leave no room for an answer of {n_answer} "
            f"tokens behind {len(orders[0])} demonstrations in the model's context of "
            f"{model.cfg.n_ctx}, first {left_out[0]!r:.80}"
        )
        if not kept:
            raise TooLongError(f"{told}; give shorter ones, or fewer examples")
        _LOG.warning("%s; they are left out", told)
    return kept


def _asked(
    model: Any, inputs: Sequence[str], demonstrations: Sequence[Example], template: PromptTemplate
) -> list[TokenisedExample]:
    prompts = tokenise_prompts(model, [template.render(text, demonstrations) for text in inputs])
    return [
        TokenisedExample(prompt, (), text, "") for prompt, text in zip(prompts, inputs, strict=True)
    ]


def _with(example: TokenisedExample, answer: Sequence[int]) -> TokenisedExample:
    return TokenisedExample(example.prompt, tuple(answer), example.input, "")


def _along_answers(
    model: Any, examples: Sequence[TokenisedExample], edit: Edit
) -> Float[Tensor, "n_tokens d_model"]:
    """Normalised last residuals from the last prompt token on, of all answers in order."""
    parts: list[Tensor] = []
    for first in range(0, len(examples), _ASKED_AT_ONCE):
        prompts = freeze(model, examples[first : first + _ASKED_AT_ONCE], share_prefix=True)
        parts += answer_hidden(prompts, edit)
    return torch.cat(parts)

"""Opinion questions as prompts: balanced orders, shares that move with options, and refusals."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_laai.opinions import (
    OpinionQuestion,
    OpinionTemplate,
    OptionExample,
    option_examples,
    option_orders,
)

TEA = OpinionQuestion("tea", "Tea or coffee?", ("tea", "coffee", "none"), (0.2, 0.7, 0.1), "all")


def question_of(n_options: int, text: str = "How much?") -> OpinionQuestion:
    shares = [i + 1 for i in range(n_options)]
    return OpinionQuestion(
        text, text, tuple(map(str, range(n_options))), tuple(s / sum(shares) for s in shares)
    )


@given(st.integers(2, 26), st.integers(1, 60), st.integers(0, 99))
def test_orders_put_each_option_at_each_position_equally_often(
    n_options: int, n_orders: int, seed: int
) -> None:
    orders = option_orders(question_of(n_options), n_orders, seed=seed)
    assert len(orders) == n_orders
    assert all(sorted(order) == list(range(n_options)) for order in orders)
    for position in range(n_options):
        counts = Counter(order[position] for order in orders)
        times = [counts[option] for option in range(n_options)]
        assert max(times) - min(times) <= 1
        if n_orders % n_options == 0:
            assert set(times) == {n_orders // n_options}


def test_orders_follow_from_seed_and_text_alone() -> None:
    one, other = question_of(5), question_of(5, "How many?")
    assert option_orders(one, 7) == option_orders(one, 9)[:7]
    assert option_orders(one, 5) != option_orders(one, 5, seed=1)
    assert option_orders(one, 5) != option_orders(other, 5)


def test_every_prompt_can_be_brought_back_to_the_questions_own_order() -> None:
    examples = option_examples([TEA, question_of(4)], n_orders=5, seed=3)
    assert [e.question for e in examples] == ["tea"] * 5 + ["How much?"] * 5
    for example in examples[:5]:
        lettered = dict(zip(example.names, example.distribution, strict=True))
        for name, option in zip(example.names, example.order, strict=True):
            assert f"\n{name.strip()}. {TEA.options[option]}\n" in example.prompt
            assert lettered[name] == TEA.distribution[option]


def test_a_prompt_is_what_the_template_says() -> None:
    [example] = option_examples([TEA], n_orders=1)
    options = "\n".join(f"{x}. {TEA.options[i]}" for x, i in zip("ABC", example.order, strict=True))
    assert example.prompt == f"Question: Tea or coffee?\n{options}\nAnswer:"
    assert example.names == (" A", " B", " C")
    assert example.outside_weight == 1
    [among] = option_examples([TEA], n_orders=1, outside_weight=0.0)
    assert among == replace(example, outside_weight=0.0)


def test_demonstrations_are_answered_with_the_most_frequent_option() -> None:
    shown = OpinionTemplate().demonstrate([TEA], seed=4)
    [(_, *lines)] = [shown.removesuffix("\n\n").split("\n")]
    answer = lines[-1].removeprefix("Answer: ")
    assert f"{answer}. coffee" in lines
    [example] = option_examples([question_of(2)], n_orders=1, demonstrations=[TEA], seed=4)
    assert example.prompt.startswith(shown + "Question: How much?")
    assert OpinionTemplate().demonstrate([]) == ""


def test_demonstrations_do_not_always_have_the_same_letter() -> None:
    many = [question_of(4, f"How much {i}?") for i in range(40)]
    answers = Counter(OpinionTemplate().demonstrate([q]).split()[-1] for q in many)
    assert set(answers) == set("ABCD")


def test_braces_in_questions_and_options_are_left_alone() -> None:
    odd = OpinionQuestion("q", "Is {options} {letter}?", ("{letter}", "{question}"), (0.5, 0.5))
    prompt = OpinionTemplate().ask(odd.question, odd.options)
    assert prompt == "Question: Is {options} {letter}?\nA. {letter}\nB. {question}\nAnswer:"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "question must not be empty"),
        ({"options": ("tea",), "distribution": (1.0,)}, "give 2 to 26 different ones"),
        ({"options": ("tea", "tea", "none")}, "give 2 to 26 different ones"),
        ({"options": ("tea", "", "none")}, "options must not be empty"),
        ({"distribution": (0.5, 0.5)}, "2 shares, but there are 3 options"),
        ({"distribution": (0.5, 0.5, 0.1)}, "sum to 1"),
        ({"distribution": (1.5, -0.5, 0.0)}, "shares of 0 or more"),
    ],
)
def test_a_question_that_is_none_is_refused(change: dict[str, Any], message: str) -> None:
    fields = {name: getattr(TEA, name) for name in ("id", "question", "options", "distribution")}
    with pytest.raises(ValueError, match=message):
        OpinionQuestion(**(fields | change))


def test_other_malformed_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="options must be text, got 3"):
        OpinionQuestion("q", "How many?", (3, 4), (0.5, 0.5))  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ValueError, match=r"order is \(0, 0\)"):
        OptionExample("Tea?", (" A", " B"), (0.5, 0.5), (0, 0))
    with pytest.raises(ValueError, match=r"outside_weight is -1\.0; give a number from 0 on"):
        option_examples([TEA], outside_weight=-1.0)
    with pytest.raises(ValueError, match="n_orders is 0"):
        option_orders(TEA, 0)
    with pytest.raises(ValueError, match=r"text must contain \{options\} once"):
        OpinionTemplate(text="{question}")


def test_the_first_prompt_of_a_question_bears_the_outside_weight_of_all() -> None:
    questions = [OpinionQuestion(q, q, ("yes", "no"), (0.3, 0.7)) for q in ("Tea?", "Sea?")]
    weights = [e.outside_weight for e in option_examples(questions, n_orders=3, outside_weight=0.5)]
    assert weights == [1.5, 0, 0] * 2
    with pytest.raises(ValueError, match="outside_weight is nan; give a number from 0 on"):
        option_examples(questions, outside_weight=math.nan)

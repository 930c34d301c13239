"""Greedy answers and log-probabilities under edits, against full forwards at every step."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from tiny import N_CTX, VOCABULARY_SIZE, tiny_model
from torch import Tensor

from tl_laai import decoding
from tl_laai.decoding import answer_log_probabilities, decode, longest_answer
from tl_laai.edits import Edit
from tl_laai.interventions import Intervention
from tl_laai.prefix import freeze
from tl_laai.prompts import TokenisedExample, tokenise
from tl_laai.tasks import Task

N_NEW = 5


@functools.cache
def model_of(backend: str, family: str) -> Any:
    """The shared models, but a gemma whose greedy text is worth looking at."""
    if family != "gemma":
        return oracle.shared_model(backend, family)
    model = tiny_model(backend, family)
    # Large tied embeddings make it repeat its last token, whatever attention does.
    tables = {p.data_ptr(): p for p in model.parameters() if VOCABULARY_SIZE in p.shape}
    for table in tables.values():
        table.data *= 0.05
    return oracle.run_once(model)


@pytest.fixture
def model(backend: str, family: str) -> Iterator[Any]:
    yield from oracle.watched(model_of(backend, family))


@pytest.fixture
def windowed(backend: str) -> Iterator[Any]:
    yield from oracle.watched(model_of(backend, "gemma"))


def ends(model: Any, token: int) -> bool:
    text = model.tokenizer.decode([token])
    return token in (0, 1, model.tokenizer.eos_token_id) or "\n" in text


def every_edit(model: Any) -> list[Edit]:
    """No edit, zero deltas, both rules, several layers, ablated heads, and all of it at once."""
    first, last = (oracle.random_delta(model, seed=seed, scale=3.0) for seed in (1, 2))
    n_heads = model.cfg.n_heads
    ablated = torch.ones(n_heads, dtype=torch.float64)
    ablated[1] = 0.0
    faded = torch.linspace(-1, 2, n_heads, dtype=torch.float64)
    top = model.cfg.n_layers - 1
    one, other = (oracle.random_residual(model, seed=seed, scale=3.0) for seed in (3, 4))
    return [
        Edit(),
        Edit({1: torch.zeros_like(first)}),
        Edit({1: first}),
        Edit({1: first}, "every_step"),
        Edit({0: first, top: last}, "every_step"),
        Edit({top: last, 0: first}),
        Edit(scale={1: ablated}),
        Edit(scale={1: ablated}, position="every_step"),
        Edit({1: last, 2: first}, "every_step", {0: faded, 1: ablated}),
        Edit(residual={1: one}),
        Edit(residual={0: one, top: other}, position="every_step"),
        Edit(replace={1: other}),
        Edit(replace={0: one, 2: other}, position="every_step"),
        Edit({1: last}, "every_step", {0: faded}, {0: one, 2: other}, {2: one}),
    ]


def slow_decode(model: Any, example: TokenisedExample, edit: Edit, n: int) -> tuple[int, ...]:
    return oracle.greedy_continuation(
        model,
        example.prompt,
        n,
        functools.partial(ends, model),
        edit.deltas,
        edit.position,
        edit.scale,
        edit.residual,
        edit.replace,
    )


def slow_log_probability(model: Any, example: TokenisedExample, edit: Edit) -> float:
    with torch.no_grad():
        steps = oracle.log_probabilities(
            model, example, edit.deltas, edit.position, edit.scale, edit.residual, edit.replace
        )
    return float(steps.sum())


# ------------------------------------------------------------------------------ the oracle


def test_continuations_equal_full_forwards_step_by_step(model: Any) -> None:
    prompts = freeze(model, oracle.random_examples(oracle.LENGTHS[:3]))
    edits = every_edit(model)
    got = decode(prompts, edits, max_new_tokens=4)
    expected = [[slow_decode(model, e, edit, 4) for e in prompts.examples] for edit in edits]
    assert got == expected
    assert got[0] == got[1]  # a delta of zeros
    assert len({tuple(rows) for rows in got}) > 2  # the other edits do something


def test_answer_log_probabilities_equal_full_forwards(model: Any) -> None:
    prompts = freeze(model, oracle.random_examples(oracle.LENGTHS))
    edits = every_edit(model)
    got = answer_log_probabilities(prompts, edits)
    assert got.dtype == torch.float64
    for i, edit in enumerate(edits):
        for j, example in enumerate(prompts.examples):
            slow = slow_log_probability(model, example, edit)
            assert got[i, j].item() == pytest.approx(slow, rel=1e-10)


def test_few_shot_prompts_that_share_a_prefix_give_the_same(model: Any) -> None:
    examples = oracle.random_examples([(14, 1), (11, 3), (12, 2)], shared=9)
    edits = every_edit(model)
    whole, shared = freeze(model, examples), freeze(model, examples, share_prefix=True)
    assert shared.prefix_lengths.tolist() == [9]
    got = decode(shared, edits, max_new_tokens=4)
    assert got == decode(whole, edits, max_new_tokens=4)
    assert got[8] == [slow_decode(model, e, edits[8], 4) for e in examples]
    torch.testing.assert_close(
        answer_log_probabilities(shared, edits),
        answer_log_probabilities(whole, edits),
        rtol=1e-10,
        atol=0,
    )


def test_the_residual_of_the_entry_layer_is_edited_too(windowed: Any) -> None:
    one, other = (oracle.random_residual(windowed, seed=seed, scale=3.0) for seed in (3, 4))
    for edit in (Edit(residual={2: one}), Edit(residual={2: one}, replace={2: other})):
        prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS[:2]))
        got = answer_log_probabilities(prompts, [edit])[0].tolist()
        slow = [slow_log_probability(windowed, example, edit) for example in prompts.examples]
        assert got == pytest.approx(slow, rel=1e-10)
        assert list(prompts.residuals) == [2]  # entered there, and kept unedited
        assert answer_log_probabilities(prompts, [edit])[0].tolist() == got


# -------------------------------------------------------------------------------- batches


def test_a_batch_equals_its_edits_and_examples_one_by_one(windowed: Any) -> None:
    examples, edits = oracle.random_examples(oracle.LENGTHS[:3]), every_edit(windowed)[4::2]
    together = freeze(windowed, examples)
    answers = decode(together, edits, max_new_tokens=N_NEW)
    scores = answer_log_probabilities(together, edits)
    for j, example in enumerate(examples):
        alone = freeze(windowed, [example])
        for i, edit in enumerate(edits):
            assert decode(alone, [edit], max_new_tokens=N_NEW) == [[answers[i][j]]]
            score = answer_log_probabilities(alone, [edit])
            torch.testing.assert_close(score[0, 0], scores[i, j], rtol=1e-10, atol=0)


@pytest.mark.parametrize("rows_at_once", [1, 4])
def test_rows_in_portions_give_the_same(
    windowed: Any, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    edits = every_edit(windowed)[4::2]
    answers = decode(prompts, edits, max_new_tokens=3)
    scores = answer_log_probabilities(prompts, edits)
    monkeypatch.setattr(decoding, "ROWS_AT_ONCE", rows_at_once)
    assert decode(prompts, edits, max_new_tokens=3) == answers
    torch.testing.assert_close(answer_log_probabilities(prompts, edits), scores, rtol=1e-11, atol=0)


def test_decoding_twice_gives_the_same(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    edits = every_edit(windowed)
    first = decode(prompts, edits, max_new_tokens=N_NEW)
    answer_log_probabilities(prompts, edits)
    assert decode(prompts, edits, max_new_tokens=N_NEW) == first


def test_the_model_is_left_as_found(model: Any) -> None:
    before = oracle.state_of(model)
    prompts = freeze(model, oracle.random_examples(oracle.LENGTHS))
    decode(prompts, every_edit(model), max_new_tokens=2)
    answer_log_probabilities(prompts, every_edit(model))
    assert oracle.state_of(model) == before


def test_a_failure_in_the_middle_leaves_the_model_as_found(
    windowed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    before = oracle.state_of(windowed)

    def fails(*_: Any) -> Tensor:
        raise RuntimeError("in the middle")

    monkeypatch.setattr(decoding._Edits, "apply", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        decode(prompts, [Edit()], max_new_tokens=2)
    with pytest.raises(RuntimeError, match="in the middle"):
        answer_log_probabilities(prompts, [Edit()])
    assert oracle.state_of(windowed) == before


# ----------------------------------------------------------------------------- where it ends


def speak(
    monkeypatch: pytest.MonkeyPatch, model: Any, texts: dict[int, str], special: set[int]
) -> None:
    """Give some tokens other texts, or make them special; all others are words."""

    def decode_as_told(tokens: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(
            "" if skip_special_tokens and token in special else texts.get(token, f"<{token}>")
            for token in tokens
        )

    monkeypatch.setattr(model.tokenizer, "decode", decode_as_told)


@pytest.fixture
def talk(windowed: Any) -> tuple[Any, Any, tuple[int, ...]]:
    """A model, a frozen prompt, and its continuation, in which a token is new at index 2."""
    for seed in range(20):
        prompts = freeze(windowed, oracle.random_examples([(7, 1)], seed=seed))
        (written,) = decode(prompts, [Edit()], max_new_tokens=N_NEW)[0]
        if len(written) == N_NEW and written[2] not in written[:2]:
            return windowed, prompts, written
    raise AssertionError("no such continuation among twenty")


@pytest.mark.parametrize(
    ("text", "special", "kept"),
    [
        ("\n", False, 2),
        (" \n\n", False, 2),  # nothing to read before the newline
        (".\n", False, 3),  # the full stop belongs to the answer
        ("ab\nQ:", False, 3),
        ("<end_of_turn>", True, 2),
        ("", False, N_NEW),  # part of a character
        (" ", False, N_NEW),
    ],
)
def test_a_continuation_ends_with_a_newline_or_before_a_special_token(
    talk: tuple[Any, Any, tuple[int, ...]],
    text: str,
    special: bool,
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, prompts, written = talk
    last = written[2]
    speak(monkeypatch, model, {last: text}, {last} if special else set())
    assert decode(prompts, [Edit()], max_new_tokens=N_NEW) == [[written[:kept]]]


def test_a_continuation_ends_before_the_end_token(
    talk: tuple[Any, Any, tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts, written = talk
    speak(monkeypatch, model, {}, set())
    eos = model.tokenizer.eos_token
    model.tokenizer.eos_token = model.tokenizer.convert_ids_to_tokens(written[2])
    try:
        assert decode(prompts, [Edit()], max_new_tokens=N_NEW) == [[written[:2]]]
    finally:
        model.tokenizer.eos_token = eos


def test_rows_that_end_early_do_not_disturb_the_others(
    windowed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS * 3, seed=5))
    speak(monkeypatch, windowed, {}, set())
    full = decode(prompts, every_edit(windowed), max_new_tokens=N_NEW)
    seen = [token for rows in full for row in rows for token in row]
    frequent = max(set(seen), key=seen.count)
    speak(monkeypatch, windowed, {frequent: "\n"}, set())
    cut = [
        [row[: row.index(frequent)] if frequent in row else row for row in rows] for rows in full
    ]
    assert {len(row) for rows in cut for row in rows} > {0, N_NEW}  # some end at once, some never
    assert decode(prompts, every_edit(windowed), max_new_tokens=N_NEW) == cut


def test_no_new_tokens_are_no_continuation(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    assert decode(prompts, [Edit()], max_new_tokens=0) == [[()] * len(oracle.LENGTHS)]


def test_continuations_may_fill_the_context_and_not_more(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples([(N_CTX - 3, 1), (4, 1)]))
    rows = decode(prompts, [Edit()], max_new_tokens=3)[0]
    assert rows[0] == slow_decode(windowed, prompts.examples[0], Edit(), 3)
    with pytest.raises(ValueError, match=rf"max_new_tokens is 4.*take {N_CTX + 1} tokens.*{N_CTX}"):
        decode(prompts, [Edit()], max_new_tokens=4)


def test_no_edits_give_no_rows(windowed: Any) -> None:
    prompts = freeze(windowed, oracle.random_examples(oracle.LENGTHS))
    assert decode(prompts, [], max_new_tokens=2) == []
    assert answer_log_probabilities(prompts, []).shape == (0, len(oracle.LENGTHS))


def test_longest_answer_leaves_a_margin() -> None:
    assert longest_answer(oracle.random_examples(oracle.LENGTHS)) == 8
    assert longest_answer(oracle.random_examples(oracle.LENGTHS), margin=0) == 4


# ---------------------------------------------------------------------------------- real Gemma


def test_gemma_answers_as_model_generate_does(gemma: Any) -> None:
    split = Task.load("country-capital").split(train=2, seed=0)
    prompts = freeze(gemma, tokenise(gemma, split.train))
    delta = oracle.random_delta(gemma, seed=3, scale=0.5).float()
    for position in ("prompt_end", "every_step"):
        got = decode(prompts, [Edit({6: delta}, position)], max_new_tokens=3)[0]
        intervention = Intervention({6: delta}, position=position)
        for example, written in zip(prompts.examples, got, strict=True):
            with intervention.applied_to(gemma):
                whole = gemma.generate(
                    torch.tensor([example.prompt]),
                    max_new_tokens=3,
                    do_sample=False,
                    verbose=False,
                    stop_at_eos=False,
                )
            own = whole[0, len(example.prompt) :].tolist()
            assert list(written) == own[: len(written)]
            assert len(written) == 3 or ends(gemma, own[len(written)])

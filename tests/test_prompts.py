"""Tests of prompts: templates, and tokens that keep prompt and answer apart exactly."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerFast

from tl_laai.prompts import (
    PromptTemplate,
    TokenisedExample,
    TokenisingModel,
    decoded_answer,
    end_tokens,
    sample_demonstrations,
    tokenise,
    tokenise_prompts,
)
from tl_laai.tasks import Example, Task

CLASSES: dict[str, Any] = {"TransformerBridge": TransformerBridge}
try:
    from transformer_lens import HookedTransformer
except ImportError:  # TransformerLens 4 has only the Bridge
    pass
else:
    CLASSES["HookedTransformer"] = HookedTransformer

BOS = 0
KENYA, PERU, CHAD = Example("Kenya", "Nairobi"), Example("Peru", "Lima"), Example("Chad", "X")


def byte_tokenizer(
    *, merges: tuple[tuple[str, str], ...] = (), by_word: bool = False
) -> PreTrainedTokenizerFast:
    """One token a byte, and one a merge; puts a BOS first and drops every "~"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["<s>", *alphabet, *("".join(merge) for merge in merges)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.normalizer = normalizers.Replace("~", "")
    # Without a regular expression merges may cross from one word into the next.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=by_word)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<s>")


class StubModel:
    """The part of a model that tokenising needs, written as plainly as can be."""

    def __init__(
        self,
        *,
        merges: tuple[tuple[str, str], ...] = (),
        by_word: bool = False,
        n_ctx: int = 4096,
        bos: bool = True,
    ) -> None:
        self.tokenizer = byte_tokenizer(merges=merges, by_word=by_word)
        self.cfg = SimpleNamespace(n_ctx=n_ctx, default_prepend_bos=bos)

    def to_tokens(
        self, input: str, prepend_bos: bool | None = None, truncate: bool = True
    ) -> torch.Tensor:
        bos = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        ids = [BOS] * bos + self.tokenizer(input, add_special_tokens=False)["input_ids"]
        return torch.tensor([ids[: self.cfg.n_ctx] if truncate else ids])

    def read(self, ids: tuple[int, ...]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


# --- Templates


def test_the_default_prompt_asks_for_an_answer_that_starts_with_a_space() -> None:
    template = PromptTemplate()
    assert template.render("Kenya") == "Q: Kenya\nA:"
    assert template.answer("Nairobi") == " Nairobi"


def test_demonstrations_stand_before_the_query_in_their_order() -> None:
    prompt = PromptTemplate().render("Kenya", [PERU, CHAD])
    assert prompt == "Q: Peru\nA: Lima\n\nQ: Chad\nA: X\n\nQ: Kenya\nA:"


def test_every_part_of_a_template_can_be_chosen() -> None:
    template = PromptTemplate("{input} = {input} ->", answer_prefix="\t", separator=" | ")
    assert template.render("a", [PERU]) == "Peru = Peru ->\tLima | a = a ->"
    assert template.answer("b") == "\tb"


@pytest.mark.parametrize("text", ["{input}", "{output}", "{", "}}", "{0}", "%s", r"\1"])
def test_braces_and_escapes_in_the_data_are_left_alone(text: str) -> None:
    prompt = PromptTemplate("[{x}] {input}:").render(text, [Example(text, text)])
    assert prompt == "[{x}] " + text + ": " + text + "\n\n[{x}] " + text + ":"


def test_a_template_without_a_place_for_the_input_is_refused() -> None:
    with pytest.raises(ValueError, match=r"text must contain \{input\}.*got 'Q: \{question\}'"):
        PromptTemplate("Q: {question}")


@pytest.mark.parametrize("field", ["text", "answer_prefix", "separator", "answer_end"])
def test_a_template_field_that_is_not_text_is_refused(field: str) -> None:
    with pytest.raises(TypeError, match=f"{field} must be text, got None"):
        PromptTemplate(**{field: None})  # type: ignore[arg-type]  # the wrong type is the point


# --- Tokens


def test_prompt_and_answer_are_the_joint_tokens_where_the_prompt_is_their_prefix() -> None:
    model = StubModel()
    [one] = tokenise(model, [KENYA])
    assert one.prompt == tuple(model.to_tokens("Q: Kenya\nA:")[0].tolist())
    assert one.prompt + one.answer == tuple(model.to_tokens("Q: Kenya\nA: Nairobi\n")[0].tolist())
    assert (one.input, one.output) == ("Kenya", "Nairobi")
    assert model.read(one.answer) == " Nairobi\n"


class LeadingSpace(StubModel):
    """As SentencePiece does, puts a space before a text that has none."""

    def to_tokens(
        self, input: str, prepend_bos: bool | None = None, truncate: bool = True
    ) -> torch.Tensor:
        return super().to_tokens(" " + input, prepend_bos, truncate)


def test_the_answer_keeps_merges_that_only_its_place_after_the_prompt_allows() -> None:
    """Tokenised alone, an answer may come out otherwise than behind its prompt."""

    model = LeadingSpace()
    [one] = tokenise(model, [KENYA], template=PromptTemplate(answer_prefix="", answer_end=""))
    assert model.read(one.answer) == "Nairobi"


def test_an_answer_ends_as_its_text_goes_on_and_not_as_a_text_of_its_own() -> None:
    model = LeadingSpace()
    [labelled] = tokenise(model, [KENYA])
    found = end_tokens(model, "Nairobi", "\n")
    assert found == labelled.answer[-1:]
    assert model.read(found) == "\n"
    assert end_tokens(model, "Nairobi", "") == ()
    merging = StubModel(merges=(("i", "Ċ"),))  # the answer's own tokens stand
    assert merging.read(end_tokens(merging, "Nairobi", "\n")) == "\n"


def test_a_merge_across_the_seam_leaves_the_prompt_as_it_is_on_its_own() -> None:
    merging = StubModel(merges=((":", "Ġ"),))  # "A:" + " Nairobi" share the token ": "
    joint = tuple(merging.to_tokens("Q: Kenya\nA: Nairobi\n")[0].tolist())
    [one] = tokenise(merging, [KENYA])
    assert one.prompt == tuple(merging.to_tokens("Q: Kenya\nA:")[0].tolist())
    assert joint[: len(one.prompt)] != one.prompt
    assert BOS not in one.answer
    assert merging.read(one.answer) == " Nairobi\n"
    assert merging.read(one.prompt + one.answer) == merging.read(joint)


merge_sets = st.lists(
    st.tuples(st.sampled_from(":ĊAQaeiĠ"), st.sampled_from(":ĊĠNnaei")), unique=True, max_size=6
)
words = st.text("aeinNĠ :{}é\n", min_size=1, max_size=8).filter(str.strip)
one_line = words.filter(lambda text: "\n" not in text.strip() and not text[0].isspace())


@given(merges=merge_sets, pairs=st.lists(st.tuples(words, one_line), min_size=1, max_size=4))
@settings(deadline=None, max_examples=50)
def test_whatever_the_merges_the_tokens_spell_the_text_and_the_prompt_is_its_own(
    merges: list[tuple[str, str]], pairs: list[tuple[str, str]]
) -> None:
    model = StubModel(merges=tuple(merges))
    template = PromptTemplate()
    shown, *asked = [Example(*pair) for pair in [("aN", "i"), *pairs]]
    tokenised = tokenise(model, asked, demonstrations=[shown])
    assert len(tokenised) == len(asked)
    for example, one in zip(asked, tokenised, strict=True):
        prompt = template.render(example.input, [shown])
        assert one.prompt == tuple(model.to_tokens(prompt)[0].tolist())
        assert one.prompt[0] == BOS
        assert BOS not in one.prompt[1:] + one.answer
        assert model.read(one.prompt + one.answer) == prompt + " " + example.output + "\n"
        joint = tuple(model.to_tokens(prompt + " " + example.output + "\n")[0].tolist())
        if joint[: len(one.prompt)] == one.prompt:
            assert one.prompt + one.answer == joint


def test_a_model_that_uses_no_bos_gets_none() -> None:
    [one] = tokenise(StubModel(bos=False), [KENYA])
    [two] = tokenise(StubModel(bos=True), [KENYA])
    assert (BOS, *one.prompt) == two.prompt
    assert one.answer == two.answer


def bound_to_a_stub(to_tokens: Callable[..., torch.Tensor], *, prepends: bool) -> Any:
    """TransformerLens's own method with the small tokenizer, and no model behind it."""
    tokenizer = byte_tokenizer(merges=((":", "Ġ"), ("a", "i")))
    if not prepends:
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    stub = SimpleNamespace(
        tokenizer=tokenizer,
        cfg=SimpleNamespace(
            n_ctx=60, default_prepend_bos=True, tokenizer_prepends_bos=prepends, device="cpu"
        ),
    )
    stub.to_tokens = lambda *args, **options: to_tokens(stub, *args, **options)
    return stub


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("prepends", [True, False])
@pytest.mark.parametrize("class_name", ["HookedTransformer", "TransformerBridge"])
def test_both_transformer_lens_classes_give_what_the_plain_stub_gives(
    class_name: str, prepends: bool, padding_side: str
) -> None:
    if class_name not in CLASSES:
        pytest.skip("TransformerLens 4 has no HookedTransformer")
    model = bound_to_a_stub(CLASSES[class_name].to_tokens, prepends=prepends)
    model.tokenizer.padding_side = padding_side
    plain = StubModel(merges=((":", "Ġ"), ("a", "i")))
    assert isinstance(model, TokenisingModel)
    assert tokenise(model, [KENYA, PERU], demonstrations=[CHAD]) == tokenise(
        plain, [KENYA, PERU], demonstrations=[CHAD]
    )
    assert tokenise_prompts(model, ["Q: Peru"]) == tokenise_prompts(plain, ["Q: Peru"])
    with pytest.raises(ValueError, match="more than the model's context of 60"):
        tokenise(model, [KENYA], demonstrations=[PERU, CHAD] * 9)


@pytest.mark.parametrize("text", ["Q: {input}\nA:", "{input} ->"])
def test_an_answer_ends_behind_demonstrations_in_the_tokens_that_theirs_end_in(text: str) -> None:
    """GPT-2's rule: an empty line is one token at the end of a text, and two before a word."""
    model = StubModel(merges=(("Ċ", "Ċ"),), by_word=True)
    template = PromptTemplate(text).behind_demonstrations()
    (shown,) = tokenise(model, [KENYA], template=template, demonstrations=[PERU])
    assert model.read(shown.answer) == " Nairobi\n\n"
    assert model.read(shown.answer[-1:]) == "\n"
    (goes_on,) = tokenise_prompts(model, [template.render("Chad", [PERU, KENYA])])
    whole = shown.prompt + shown.answer
    assert goes_on[: len(whole)] == whole
    (alone,) = tokenise(model, [KENYA], template=template)
    assert model.read(alone.answer[-1:]) == "\n\n"


def test_an_answer_that_tokenises_to_nothing_is_refused_by_name() -> None:
    template = PromptTemplate(answer_prefix="", answer_end="")
    with pytest.raises(ValueError, match="output '~~' tokenises to nothing"):
        tokenise(StubModel(), [Example("Kenya", "~~")], template=template)


def test_an_empty_list_of_examples_or_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match="examples must hold at least one"):
        tokenise(StubModel(), [])
    with pytest.raises(ValueError, match="prompts must hold at least one"):
        tokenise_prompts(StubModel(), [])


def test_prompt_and_answer_may_fill_the_context_but_not_exceed_it() -> None:
    length = 1 + len("Q: Kenya\nA: Nairobi\n")
    [one] = tokenise(StubModel(n_ctx=length), [KENYA])
    assert len(one.prompt + one.answer) == length
    complaint = f"prompt and answer of 'Kenya' take {length} tokens.*context of {length - 1}"
    with pytest.raises(ValueError, match=complaint):
        tokenise(StubModel(n_ctx=length - 1), [PERU, KENYA])


def test_a_prompt_longer_than_the_context_is_refused_and_never_cut() -> None:
    with pytest.raises(ValueError, match=r"take 12 tokens.*context of 11; shorten"):
        tokenise(StubModel(n_ctx=11), [KENYA])
    with pytest.raises(ValueError, match=r"the prompt 'xxx.*take 12 tokens"):
        tokenise_prompts(StubModel(n_ctx=11), ["ok", "x" * 11])


def test_free_prompts_are_tokenised_as_they_are() -> None:
    model = StubModel()
    prompts = ["Q: Kenya\nA:", "once upon"]
    tokens = tokenise_prompts(model, prompts)
    assert tokens == tuple(tuple(model.to_tokens(text)[0].tolist()) for text in prompts)
    assert [model.read(ids) for ids in tokens] == prompts
    assert tokens[0] == tokenise(model, [KENYA])[0].prompt


def test_one_string_is_no_sequence_of_prompts() -> None:
    with pytest.raises(TypeError, match=r"got 'Q: Kenya'; write \[prompt\]"):
        tokenise_prompts(StubModel(), "Q: Kenya")


def test_a_prompt_without_any_token_is_refused() -> None:
    with pytest.raises(ValueError, match="prompt '~' tokenises to nothing"):
        tokenise_prompts(StubModel(bos=False), ["~"])
    assert tokenise_prompts(StubModel(bos=True), ["~"]) == ((BOS,),)


def test_a_hundred_examples_with_ten_demonstrations_take_a_fraction_of_a_second() -> None:
    split = Task.load("country-capital").split(train=10, test=100)
    model = StubModel()
    tokenise(model, split.test[:2], demonstrations=split.train)  # first calls build caches

    def seconds() -> float:
        start = time.perf_counter()
        tokenise(model, split.test, demonstrations=split.train)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) < 0.3


# --- Demonstrations and answers


@given(k=st.integers(0, 20), more=st.integers(0, 20), seed=st.integers(0, 2**64))
@settings(deadline=None, max_examples=50)
def test_more_demonstrations_extend_fewer_and_none_is_shown_twice(
    k: int, more: int, seed: int
) -> None:
    train = tuple(Example(str(i), str(i)) for i in range(40))
    few, many = sample_demonstrations(train, k, seed), sample_demonstrations(train, k + more, seed)
    assert many[:k] == few
    assert len(set(many)) == len(many) == k + more
    assert set(many) <= set(train)


def test_demonstrations_depend_on_the_seed_and_not_on_the_global_random_state() -> None:
    train = tuple(Example(str(i), str(i)) for i in range(40))
    drawn = set()
    for state in range(5):
        random.seed(state)
        drawn.add(sample_demonstrations(train, 5, 3))
    assert len(drawn) == 1
    assert len({sample_demonstrations(train, 5, seed) for seed in range(20)}) == 20


def test_more_demonstrations_than_there_are_and_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="k must be at most the 2 examples there are, got 3"):
        sample_demonstrations([KENYA, PERU], 3, 0)
    with pytest.raises(ValueError, match="k must be 0 or more, got -1"):
        sample_demonstrations([KENYA, PERU], -1, 0)
    with pytest.raises(ValueError, match="seed must be 0 or more, got -1"):
        sample_demonstrations([KENYA, PERU], 1, -1)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Nairobi", "Nairobi"),
        (" Nairobi\n\nQ: Peru\nA: Lima", "Nairobi"),
        (" Port Louis \r\nand more", "Port Louis"),
        ("\nNairobi", ""),
        ("", ""),
        ("Nairobi, Kenya", "Nairobi, Kenya"),
    ],
)
def test_a_decoded_answer_ends_at_the_first_newline(text: str, answer: str) -> None:
    assert decoded_answer(text) == answer


@pytest.mark.parametrize(
    ("template", "demonstrated", "text", "answer"),
    [
        (PromptTemplate(answer_end="."), False, " Lima. And", "Lima"),
        (PromptTemplate(answer_end=" <end>\n"), False, " Lima<end>", "Lima"),
        (PromptTemplate(separator="; "), True, " Lima; Q: Mali", "Lima"),
        (PromptTemplate(separator="; "), False, " Lima; Peru", "Lima; Peru"),
        (PromptTemplate(), True, " Lima. And\n\nQ", "Lima. And"),
    ],
)
def test_an_answer_ends_as_the_template_says(
    template: PromptTemplate, demonstrated: bool, text: str, answer: str
) -> None:
    assert decoded_answer(text, template.ends(demonstrated=demonstrated)) == answer


def test_an_output_with_a_space_of_its_own_behind_the_templates_is_refused() -> None:
    spaced = [Example("a", " i")]
    with pytest.raises(ValueError, match=r"output ' i' begins with white space.* give 'i'"):
        tokenise(StubModel(), spaced)
    own, usual = PromptTemplate(answer_prefix=""), [Example("a", "i")]
    assert tokenise(StubModel(), spaced, template=own)[0].answer == (
        tokenise(StubModel(), usual)[0].answer
    )


def test_what_is_no_model_is_refused() -> None:
    for thing in ("gpt2", object()):
        with pytest.raises(TypeError, match=r"model is a (str|object); expected a TransformerLens"):
            tokenise(thing, [Example("a", "i")])  # type: ignore[arg-type]  # on purpose


def test_an_answer_that_would_begin_with_a_newline_is_refused() -> None:
    with pytest.raises(ValueError, match=r"answer_prefix must be one line.* got '\\n'; end text"):
        PromptTemplate("{input}", answer_prefix="\n")


def test_a_tokenised_example_cannot_be_changed() -> None:
    one = TokenisedExample((1,), (2,), "a", "b")
    with pytest.raises(AttributeError):
        one.prompt = (3,)  # type: ignore[misc]  # the refused assignment is the point

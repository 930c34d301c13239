"""Prompts and answers: from examples through a template to the tokens a model is given.

The last token of a prompt is where an intervention acts. So the prompt's tokens here are always
those of the prompt on its own, the same in fitting, evaluation and generation.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Int
from torch import Tensor

from tl_laai.distributions import Distributions
from tl_laai.opinions import OptionExample
from tl_laai.splits import count, seeded_order
from tl_laai.tasks import Example


class TooLongError(ValueError):
    """A prompt, or a prompt with its answer, is longer than the model's context."""


@runtime_checkable
class TokenisingModel(Protocol):
    """What is needed of a model: both TransformerLens classes have it."""

    cfg: Any

    def to_tokens(
        self, input: str, *, prepend_bos: bool | None = ..., truncate: bool = ...
    ) -> Int[Tensor, "1 pos"]:
        """Tokenise one text, by default with the model's own rule for a BOS token."""


@dataclass(frozen=True)
class PromptTemplate:
    r"""How an input becomes a prompt, and an output the answer that follows it.

    Example:
        >>> PromptTemplate().render("Kenya", [Example("Peru", "Lima")])
        'Q: Peru\nA: Lima\n\nQ: Kenya\nA:'

    Args:
        text: The prompt, with `{input}` where the input goes. Other braces are left alone.
        answer_prefix: What stands between prompt and output, and belongs to the answer: most
            tokenisers make one token of a space and the word after it.
        separator: What stands between demonstrations, and before the query.
        answer_end: What ends an answer and belongs to what is learnt and scored: exact match
            reads up to the first newline, so a model that runs on has not answered. Without it
            a fit learns "Accra, Ghana" as readily as "Accra".

    Raises:
        TypeError: A field is not text.
        ValueError: `text` does not contain `{input}`, or `answer_prefix` holds a newline, at which
            answers end.
    """

    text: str = "Q: {input}\nA:"
    answer_prefix: str = " "
    separator: str = "\n\n"
    answer_end: str = "\n"

    def __post_init__(self) -> None:
        for field in ("text", "answer_prefix", "separator", "answer_end"):
            value: object = getattr(self, field)
            if not isinstance(value, str):
                raise TypeError(f"{field} must be text, got {value!r}; write it as a string")
        if "{input}" not in self.text:
            raise ValueError(
                f"text must contain {{input}} where the input goes, got {self.text!r}; "
                "for instance 'Q: {input}\\nA:'"
            )

        if "\n" in self.answer_prefix:
            raise ValueError(
                f"answer_prefix must be one line, as answers end at a newline, got "
                f"{self.answer_prefix!r}; end text with the newline instead"
            )

    def answer(self, output: str) -> str:
        """The text that should follow the prompt, prefix included."""
        return self.answer_prefix + output

    def render(self, input: str, demonstrations: Iterable[Example] = ()) -> str:
        """The prompt that asks for `input`, after any demonstrations.

        Args:
            input: The query. Braces in it are safe: nothing is looked for in data.
            demonstrations: Solved examples to show first, in their order.
        """
        # Not str.format: a brace in the data or elsewhere in the template would break it.
        solved = [
            self.text.replace("{input}", shown.input) + self.answer(shown.output)
            for shown in demonstrations
        ]
        return self.separator.join([*solved, self.text.replace("{input}", input)])

    def ends(self, *, demonstrated: bool) -> tuple[str, ...]:
        """What ends an answer within its line; behind demonstrations, what stands between them."""
        own = (self.answer_end, self.separator) if demonstrated else (self.answer_end,)
        return tuple(end.strip() for end in own if end.strip())

    def behind_demonstrations(self) -> PromptTemplate:
        """The same, with answers that end as those of demonstrations do: a model does so too."""
        ends_so = bool(self.answer_end) and self.separator.startswith(self.answer_end)
        return replace(self, answer_end=self.separator) if ends_so else self


DEFAULT_TEMPLATE = PromptTemplate()


@dataclass(frozen=True)
class TokenisedExample:
    """An example as token ids; prompt and answer follow each other without a gap.

    Args:
        prompt: Ids of the prompt, BOS included where the model uses one. Never empty.
        answer: Ids of the answer that follows. Never empty.
        input: The input as text.
        output: The output as text.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    input: str
    output: str


@dataclass(frozen=True, eq=False)
class TaughtExample:
    """A prompt and, at each token of an answer, the distribution that should be matched there.

    Attributes:
        tokens: The prompt, and the answer along which the teacher was asked.
        distributions: One at each token of the answer.
    """

    tokens: TokenisedExample
    distributions: Distributions


def tokenise(
    model: TokenisingModel,
    examples: Sequence[Example],
    *,
    template: PromptTemplate = DEFAULT_TEMPLATE,
    demonstrations: Sequence[Example] = (),
) -> tuple[TokenisedExample, ...]:
    """Tokenise examples as the given model does, one by one, without padding.

    Example:
        >>> batch = tokenise(model, split.test, demonstrations=split.train)  # doctest: +SKIP

    Args:
        model: A TransformerLens model with a tokenizer.
        examples: At least one.
        template: How inputs become prompts and outputs answers.
        demonstrations: Solved examples put before every prompt.

    Returns:
        One entry an example, in their order.

    Raises:
        TypeError: `model` is no TransformerLens model, `template` no template.
        ValueError: There are no examples, an answer has no tokens, or it begins with white space
            behind that of the template.
        TooLongError: A prompt with its answer is longer than the model's context.
    """
    if not examples:
        raise ValueError("examples must hold at least one example, got none")
    if not isinstance(template, PromptTemplate):
        raise TypeError(f"template is {template!r}; give a PromptTemplate, made from such a text")
    return tuple(_tokenise_one(model, e, template, demonstrations) for e in examples)


def tokenise_prompts(model: TokenisingModel, prompts: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    r"""Tokenise free prompts, each used as it is.

    Example:
        >>> tokenise_prompts(model, ["Q: Kenya\nA:"])  # doctest: +SKIP

    Raises:
        TypeError: `prompts` is one string and not a sequence of them.
        ValueError: There are none, or one has no tokens.
        TooLongError: One is longer than the model's context.
    """
    if isinstance(prompts, str):
        raise TypeError(f"prompts must be a sequence of strings, got {prompts!r}; write [prompt]")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    return tuple(_prompt_tokens(model, prompt) for prompt in prompts)


def end_tokens(model: TokenisingModel, answer: str, end: str) -> tuple[int, ...]:
    """The tokens of the text that ends an answer, as they come behind it."""
    if not end:
        return ()
    own, joint = (_ids(model, text, prepend_bos=False) for text in (answer, answer + end))
    # A text of its own may get a token in front (Llama 2: a space) that no answer is followed by.
    return joint[len(own) :] if joint[: len(own)] == own else _ids(model, end, prepend_bos=False)


def tokenise_options(
    model: TokenisingModel, example: OptionExample
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of a multiple-choice prompt, and the one token that names each option.

    Raises:
        ValueError: A name takes more than one token after the prompt, or two share theirs.
    """
    prompt = _prompt_tokens(model, example.prompt)
    names = [_continuation(model, prompt, example.prompt, name) for name in example.names]
    if any(len(tokens) != 1 for tokens in names) or len(set(names)) < len(names):
        raise ValueError(
            f"names {list(example.names)} take tokens {[list(tokens) for tokens in names]} after "
            "the prompt; each option needs one token of its own, such as ' A'"
        )
    return prompt, tuple(tokens[0] for tokens in names)


def sample_demonstrations(train: Sequence[Example], k: int, seed: int) -> tuple[Example, ...]:
    """Draw `k` different demonstrations, the same for the same seed; a larger `k` adds more.

    Example:
        >>> shown = sample_demonstrations(split.train, 5, seed=0)  # doctest: +SKIP

    Raises:
        TypeError, ValueError: `k` or `seed` is not a non-negative integer, or `k` is more than
            there is.
    """
    k, seed = count("k", k), count("seed", seed)
    if k > len(train):
        raise ValueError(f"k must be at most the {len(train)} examples there are, got {k}")
    return seeded_order(train, seed)[:k]


def decoded_answer(text: str, ends: Iterable[str] = ()) -> str:
    r"""The answer in decoded text: up to its end, without white space around it.

    Example:
        >>> decoded_answer(" Nairobi\n\nQ: Peru")
        'Nairobi'

    Args:
        text: what was decoded.
        ends: what ends it besides the first newline (`PromptTemplate.ends`).
    """
    for end in ("\n", *ends):
        text = text.partition(end)[0]
    return text.strip()


def _tokenise_one(
    model: TokenisingModel,
    example: Example,
    template: PromptTemplate,
    demonstrations: Sequence[Example],
) -> TokenisedExample:
    text, answer_text = (
        template.render(example.input, demonstrations),
        template.answer(example.output),
    )
    prompt = _prompt_tokens(model, text)
    if example.output[0].isspace() and template.answer_prefix[-1:].isspace():
        raise ValueError(
            f"output {example.output!r} begins with white space, and the template sets some before "
            f"it: give {example.output.strip()!r}, or a template with answer_prefix=''"
        )
    if not _continuation(model, prompt, text, answer_text):
        raise ValueError(
            f"output {example.output!r} tokenises to nothing; drop the example, or choose an "
            "output that this model's tokenizer knows"
        )
    answer = _continuation(model, prompt, text, answer_text + template.answer_end)
    if demonstrations and template.answer_end == template.separator:
        # As answers end in the prompt, where more follows: some tokenisers make other tokens of an
        # empty line at the end of a text.
        following = template.render(example.input)
        whole = _ids(model, text + answer_text + template.answer_end + following)
        tail = _ids(model, following, prepend_bos=False)
        if whole[: len(prompt)] == prompt and whole[-len(tail) :] == tail:
            answer = whole[len(prompt) : -len(tail)]
    _check_length(model, len(prompt) + len(answer), f"the prompt and answer of {example.input!r}")
    return TokenisedExample(prompt, answer, example.input, example.output)


def _continuation(
    model: TokenisingModel, prompt: tuple[int, ...], text: str, answer: str
) -> tuple[int, ...]:
    joint = _ids(model, text + answer)
    if joint[: len(prompt)] == prompt:
        return joint[len(prompt) :]
    # The tokeniser merges across the seam, or ends texts with a special token. A model asked the
    # prompt has read the prompt's own tokens, and can only continue those: so they stay as they
    # are, and the answer is what it could write after them.
    return _ids(model, answer, prepend_bos=False)


def no_model(thing: object) -> TypeError:
    """What to raise where a TransformerLens model is wanted, and something else given."""
    return TypeError(
        f"model is a {type(thing).__name__}; expected a TransformerLens HookedTransformer or "
        "TransformerBridge. Load one with tl_laai.load_model(name_or_path)."
    )


def _prompt_tokens(model: TokenisingModel, text: str) -> tuple[int, ...]:
    if not hasattr(model, "to_tokens"):
        raise no_model(model)
    tokens = _ids(model, text)
    if not tokens:
        raise ValueError(f"prompt {text!r} tokenises to nothing; there must be a token to edit")
    end = text if len(text) <= 40 else "…" + text[-40:]  # which tells prompts apart
    _check_length(model, len(tokens), f"the prompt {end!r}")
    return tokens


def _ids(model: TokenisingModel, text: str, **options: bool) -> tuple[int, ...]:
    # Both classes cut at n_ctx unless told not to: the end of the prompt, which is the place
    # of the intervention, would be gone without a word.
    return tuple(model.to_tokens(text, truncate=False, **options)[0].tolist())


def _check_length(model: TokenisingModel, length: int, what: str) -> None:
    if length > model.cfg.n_ctx:
        raise TooLongError(
            f"{what} take {length} tokens, more than the model's context of {model.cfg.n_ctx}; "
            "shorten them or show fewer demonstrations"
        )

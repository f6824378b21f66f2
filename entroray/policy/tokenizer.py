"""Byte tokenizer for the tiny model; of whatever tokenizer a run uses, its chat template and its text."""

import hashlib
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from entroray.errors import ConfigError, PreflightError, nearest

if TYPE_CHECKING:  # seconds, which settings alone need not take
    from transformers import PreTrainedTokenizerFast

USER, ASSISTANT, END, PAD = "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """One token a byte plus four special tokens; decode(encode(x)) == x for every string."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in (PAD, END, USER, ASSISTANT)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(path: str, template: str | None = None) -> Any:
    """The tokenizer of a model folder or hub id; the file `template` takes the place of its chat template.

    PreflightError if it cannot be loaded, or has no chat template.
    """
    from transformers import AutoTokenizer  # it imports every architecture's table

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # boundary: each kind of damaged file is another library's exception
        said = _first_line(error)
        raise PreflightError(f"model.path={path} has no tokenizer that can be loaded: {said}") from error
    tokenizer = with_template(tokenizer, template)
    if not getattr(tokenizer, "chat_template", None):
        raise PreflightError(
            f"the tokenizer of model.path={path} has no chat template, so questions cannot be rendered: use "
            "an instruct model, or write one to a file, at its simplest "
            "`{% for m in messages %}{{ m.content }}{% endfor %}`, and say model.template=my.jinja"
        )
    return tokenizer


def with_template(tokenizer: Any, template: str | None) -> Any:
    """`tokenizer` with the chat template in the file `template`, if any; PreflightError if it has none."""
    if template is None:
        return tokenizer
    try:
        text = Path(template).expanduser().read_text(encoding="utf-8-sig")
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: no UTF-8; RuntimeError: ~nobody
        text = f"it cannot be read: {_first_line(error)}"
        raise PreflightError(
            f"model.template={template} is to be the file of a Jinja template; {text}"
        ) from error
    if not text.strip():
        raise PreflightError(f"model.template={template} is to be the file of a Jinja template; it is empty")
    tokenizer.chat_template = text
    return tokenizer


# Prompts.

QUESTION, SYSTEM = "What is six times seven", "Answer in one word"
"""What a template is tried with: plain words, which none has a reason to change."""
Conversation = str | Sequence[Mapping[str, Any]]
"""A question, or messages, of which a system message that comes first takes the place of the run's."""
OWN_TEMPLATE = "give a template of your own: model.template=my.jinja"


@dataclass(frozen=True)
class Chat:
    """How a model is asked: a question as its text with every special token, and as token ids."""

    tokenizer: Any
    system: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Of the template, beside the messages."""

    def __call__(self, question: Conversation) -> tuple[int, ...]:
        """Ids as the tokenizer itself makes them of a conversation; of several BOS tokens one is left."""
        ids = self._apply(question, tokenize=True, return_dict=False)
        return tuple(ids[max(0, self._count_bos(ids) - 1) :])

    def render(self, question: Conversation) -> str:
        """The text, ready to be answered; PreflightError if the template gives none."""
        text = self._apply(question, tokenize=False)
        if not isinstance(text, str) or not text.strip():
            raise PreflightError(f"the chat template makes nothing of {str(question)[:60]!r}: {OWN_TEMPLATE}")
        return text

    def remarks(self) -> list[str]:
        """What the template does that its user may not know, each in words."""
        text, bos = self.render(QUESTION), self.tokenizer.bos_token
        own = text.partition(QUESTION)[0]
        for mark in special_tokens(self.tokenizer):
            own = own.replace(mark, " ")
        written = self._count_bos(self._apply(QUESTION, tokenize=True, return_dict=False))
        plain = self._count_bos(self.tokenizer.encode(QUESTION))
        found = {
            f"the template itself says {' '.join(own.split())!r}": not self.system and len(own.split()) > 2,
            f"the template writes {bos!r} {written} times, once is kept": written > 1,
            f"the template writes no {bos!r}, with which plain text begins": plain > written,
            "the template can write today's date, and then another prompt each day": "strftime_now"
            in _template(self.tokenizer, self.variables),
        }
        return [remark for remark, holds in found.items() if holds]

    def _apply(self, question: Conversation, **how: Any) -> Any:
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else [*question]
        before = [{"role": "system", "content": self.system}] if self.system else []
        messages = turns if turns[0]["role"] == "system" else [*before, *turns]
        apply = self.tokenizer.apply_chat_template
        try:
            return apply(messages, add_generation_prompt=True, **how, **self.variables)
        except Exception as error:  # boundary: a template is a program, and may raise anything
            raise PreflightError(
                f"the chat template fails on {str(question)[:60]!r} with {_first_line(error)}: {OWN_TEMPLATE}"
            ) from error

    def _count_bos(self, ids: Sequence[int]) -> int:
        return sum(1 for _ in takewhile(lambda token: token == self.tokenizer.bos_token_id, ids))


def chat(tokenizer: Any, system: str | None, variables: Mapping[str, Any] | None = None) -> Chat:
    """How questions are put to a model; PreflightError if its template does not say all that it is given."""
    asked = Chat(tokenizer, system, variables or {})
    _check_variables(tokenizer, asked.variables)
    problem = _problem(replace(asked, system=SYSTEM if system else None))
    if problem and system and not _problem(replace(asked, system=None)):
        raise PreflightError(
            f"model.system={system!r}, or of a part of the data: with a system message the chat template "
            f"{problem}. Put it into the questions, with model.system=null and data.template='<the message> "
            f"{{question}}', or {OWN_TEMPLATE}"
        )
    if problem:
        raise PreflightError(f"the chat template {problem}: {OWN_TEMPLATE}")
    return asked


def _problem(asked: Chat) -> str:
    """What a template does wrong with messages it has no reason to change; empty if nothing."""
    try:
        text = asked.render(QUESTION)
    except PreflightError as error:
        return (
            f"fails with {_first_line(error.__cause__)}" if error.__cause__ else "makes nothing of a question"
        )
    said = QUESTION in text and (asked.system or "") in text
    return "" if said else "leaves a message out"


def _check_variables(tokenizer: Any, variables: Mapping[str, Any]) -> None:
    """ConfigError for a variable that is not the user's to set, PreflightError for one that is not read."""
    text = _template(tokenizer, variables)
    taken = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"}
    for name in variables:
        if name in {"messages", *taken}:
            raise ConfigError(f"model.template_args.{name} is set by the run itself: leave it out")
        if not re.search(rf"\b{re.escape(name)}\b", text):
            known = re.findall(r"(?<![.\w])(\w+) is (?:not )?defined", text)
            raise PreflightError(
                f"model.template_args.{name}: the chat template reads no such variable; "
                f"{nearest(name, set(known))}"
            )


def _template(tokenizer: Any, variables: Mapping[str, Any]) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=variables.get("tools")))
    except ValueError as error:  # several by name, none of them `default`
        raise PreflightError(
            f"the tokenizer's chat template: {_first_line(error)} Instead {OWN_TEMPLATE}"
        ) from error


# Responses.


def response_text(tokenizer: Any, ends: Collection[int]) -> Callable[[Sequence[int]], str]:
    """A function from a response's ids to what a judge reads: all tokens but the one of `ends` at its end."""

    def read(ids: Sequence[int]) -> str:
        shown = ids[:-1] if len(ids) and ids[-1] in ends else ids
        return tokenizer.decode([int(i) for i in shown], clean_up_tokenization_spaces=False)

    return read


def end_ids(tokenizer: Any, model: str | None = None) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's own, then those that the files of `model` name."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return tuple(dict.fromkeys([*own, *(_generation_ends(model) if model else ())]))


def _generation_ends(model: str) -> list[int]:
    """As vLLM reads them."""
    from transformers import AutoConfig, GenerationConfig

    try:
        described = GenerationConfig.from_pretrained(model)
    except OSError:  # no such file, or a damaged one
        described = GenerationConfig.from_model_config(
            AutoConfig.from_pretrained(model, trust_remote_code=False)
        )
    found = described.eos_token_id
    return [found] if isinstance(found, int) else list(found or ())


def token_name(tokenizer: Any, token: int) -> str:
    """A token for a reader: its text; its name if that is no whole character; its id if it has no name."""
    text = tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    name = tokenizer.convert_ids_to_tokens(token)
    return f"⟨{token if name is None else name}⟩"


def special_tokens(tokenizer: Any) -> list[str]:
    """Texts that a tokenizer reads as one special token each, the longest first."""
    found = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted(found, key=len, reverse=True)


def encode_frame(tokenizer: Any) -> Callable[[str, str], list[int]]:
    """A function from a frame and a text to the ids of the frame with the text in place of `{answer}`.

    Special tokens are read in the frame alone: the text is somebody else's, and nothing is read out of it.
    """
    special = special_tokens(tokenizer)

    def encode(frame: str, text: str) -> list[int]:
        marks = "|".join(re.escape(mark) for mark in special if mark in frame)
        pieces = re.split(f"({marks})", frame) if marks else [frame]
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            if place % 2:
                ids.append(tokenizer.convert_tokens_to_ids(piece))
            elif plain := piece.replace("{answer}", text):
                ids += tokenizer.encode(plain, add_special_tokens=False, split_special_tokens=True)
        return ids

    return encode


def fingerprint(tokenizer: Any) -> str:
    """Hash of vocabulary and template, for the manifest."""
    content = repr(sorted(tokenizer.get_vocab().items())) + str(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def vocabulary_hash(tokenizer: Any) -> str:
    """Of tokens and which of them are special, for the handshake with engines, which read no template."""
    content = sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_ids)
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


def check_vocabularies(tokenizer: Any, served: Mapping[str, str], model: str) -> None:
    """PreflightError unless each engine, by name, serves the vocabulary (its hash) of `tokenizer`."""
    own = vocabulary_hash(tokenizer)
    if wrong := [f"{name} ({found})" for name, found in served.items() if found != own]:
        raise PreflightError(
            f"model.path={model}: {', '.join(wrong)} has another vocabulary there than this process ({own}): "
            "put the same files at this path on every node"
        )


def _first_line(error: BaseException) -> str:
    said = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__

"""Byte tokenizer for the tiny model, and the chat template of whatever tokenizer a run uses."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from entroray.errors import PreflightError

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


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or hub id; PreflightError when it has no chat template."""
    from transformers import AutoTokenizer  # it imports every architecture's table

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise PreflightError(f"model.path={path} has no tokenizer that can be loaded: {said}") from error
    if not tokenizer.chat_template:
        raise PreflightError(
            f"the tokenizer of model.path={path} has no chat template, so questions cannot be rendered: "
            "use an instruct model, or save a template with tokenizer.chat_template = ...; save_pretrained()"
        )
    return tokenizer


def chat(
    tokenizer: Any, system: str | None
) -> Callable[[str | Sequence[Mapping[str, Any]]], tuple[int, ...]]:
    """A function from a question to the token ids of its rendered conversation, ready to be answered.

    A question may be a list of messages; one that begins with a system message keeps it in place of `system`.
    """
    before = [{"role": "system", "content": system}] if system else []

    def tokenize(question: str | Sequence[Mapping[str, Any]]) -> tuple[int, ...]:
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else [*question]
        messages = turns if turns[0]["role"] == "system" else [*before, *turns]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tuple(tokenizer.encode(rendered, add_special_tokens=False))

    return tokenize


def fingerprint(tokenizer: Any) -> str:
    """Hash of vocabulary and template, for the manifest and the handshake with the generators."""
    content = repr(sorted(tokenizer.get_vocab().items())) + str(tokenizer.chat_template)
    return hashlib.sha256(content.encode()).hexdigest()[:16]

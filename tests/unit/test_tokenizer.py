"""What a question becomes under templates as people have them, and what of a response its judge reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from entroray.errors import ConfigError, PreflightError
from entroray.policy.tokenizer import (
    TEMPLATE,
    byte_tokenizer,
    chat,
    check_vocabularies,
    encode_frame,
    end_ids,
    load_tokenizer,
    response_text,
    token_name,
    vocabulary_hash,
    with_template,
)

PAD, END, USER, ASSISTANT, BOS, THINK = 256, 257, 258, 259, 260, 261
LOOP = "{% for m in messages %}{{ '<|user|>' + m['content'] }}{% endfor %}<|assistant|>"
QWEN = "{% if messages[0].role != 'system' %}<|user|>system\nYou are a helpful assistant.\n{% endif %}" + LOOP
TAGS = LOOP + "{% generation %}{% endgeneration %}"
THINKING = LOOP + "{% if enable_thinking is defined and not enable_thinking %}<think>{% endif %}"
NO_SYSTEM = {
    "gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + LOOP,
    "mistral": "{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}{{ raise_exception(1) }}"
    "{% endif %}{{ m.content }}{% endfor %}",
    "alternating": "{{ raise_exception('user first') if messages[0].role != 'user' }}" + LOOP,
    "silent": "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
    "last alone": "<|user|>{{ messages[-1].content }}<|assistant|>",
    "role as a number": "{{ {'user': 1}[messages[0].role] + 1 }}" + LOOP,
}
BROKEN = {
    "syntax": "{% for %}",
    "unclosed": "{{ messages",
    "unknown filter": LOOP + "{{ 1 | shout }}",
    "undefined": LOOP + "{{ nothing.at.all }}",
    "division": LOOP + "{{ 1 / 0 }}",
    "type": LOOP + "{{ 'a' + 1 }}",
    "index": LOOP + "{{ [][3].x }}",
    "range": LOOP + "{% for i in range(10 ** 9) %}{% endfor %}",
    "include": LOOP + "{% include 'other' %}",
    "unsafe": LOOP + "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "raises": "{{ raise_exception('not today') }}",
    "empty": "{# nothing #}",
    "blank": " \n\t ",
    "ignores": "<|user|>Hello!<|assistant|>",
    "list of parts": "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}!",
}


def tokenizer(template: Any = LOOP) -> Any:
    """The byte tokenizer with a BOS token, a special tag that has no name, and this template."""
    made = byte_tokenizer()
    made.add_special_tokens({"bos_token": "<s>"})
    made.add_tokens([AddedToken("<think>", special=True, normalized=False)])
    made.chat_template = template
    return made


@pytest.mark.parametrize("template", NO_SYSTEM.values(), ids=NO_SYSTEM.keys())
def test_a_template_without_a_system_message_is_refused_with_what_to_do(template: str) -> None:
    remedies = r"model\.system=null .*data\.template='.*\{question\}'.*model\.template="
    with pytest.raises(PreflightError, match=r"model\.system='Be brief\.'.*" + remedies):
        chat(tokenizer(template), "Be brief.")
    assert "7+8=" in chat(tokenizer(template), None).render("7+8=")


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("template", BROKEN.values(), ids=BROKEN.keys())
def test_whatever_a_template_does_not_render_is_one_typed_sentence(template: str, system: str | None) -> None:
    with pytest.raises(PreflightError, match=r"chat template .*model\.template=") as refused:
        chat(tokenizer(template), system)
    assert "\n" not in str(refused.value) and "model.system" not in str(refused.value)


def test_a_question_that_its_template_fails_on_is_named() -> None:
    asked = chat(tokenizer("{{ 1 / (messages[0].content | length - 4) }}" + LOOP), None)
    assert asked("7+8")
    with pytest.raises(PreflightError, match=r"'7\+8=' .*ZeroDivisionError.*model\.template="):
        asked("7+8=")


def test_a_template_that_wants_a_system_message_may_have_one() -> None:
    wants = "{{ raise_exception('who am I?') if messages[0].role != 'system' }}" + LOOP
    assert chat(tokenizer(wants), "Add.").render("1+2=") == "<|user|>Add.<|user|>1+2=<|assistant|>"
    with pytest.raises(PreflightError, match=r"who am I.*model\.template="):
        chat(tokenizer(wants), None)


def test_templates_by_name_need_a_default_one() -> None:
    several = {"default": LOOP, "tool_use": "{{ tools }}" + LOOP}
    assert chat(tokenizer(several), None).render("1") == "<|user|>1<|assistant|>"
    assert chat(tokenizer(several), None, {"tools": [{"a": 1}]}).render("1").startswith("[{'a': 1}]")
    with pytest.raises(PreflightError, match=r"model\.template="):
        chat(tokenizer({"rag": LOOP}), None)


def test_generation_tags_leave_no_trace() -> None:
    assert chat(tokenizer(TAGS), None)("1+2=") == chat(tokenizer(), None)("1+2=")


def test_variables_reach_the_template_and_what_it_does_not_read_is_refused() -> None:
    switched = lambda on: chat(tokenizer(THINKING), None, {"enable_thinking": on})("1")
    assert switched(False) == (*switched(True), THINK) and switched(True) == chat(tokenizer(), None)("1")
    with pytest.raises(PreflightError, match=r"model\.template_args\.enable_thinkin\b.*`enable_thinking`"):
        chat(tokenizer(THINKING), None, {"enable_thinkin": False})
    for taken in ("add_generation_prompt", "messages", "tokenize", "return_dict", "chat_template"):
        with pytest.raises(ConfigError, match=rf"model\.template_args\.{taken}\b"):
            chat(tokenizer("{{ add_generation_prompt }}" + LOOP), None, {taken: False})


def test_ids_are_those_of_the_tokenizer_and_begin_with_one_bos() -> None:
    once, twice = tokenizer("<s>" + LOOP), tokenizer("<s>{{ bos_token }}" + LOOP)
    (own,) = once.apply_chat_template([[{"role": "user", "content": "a<s>b"}]], return_dict=False)
    assert chat(once, None)("a<s>b") == tuple(own) == (BOS, USER, 64, BOS, 65, ASSISTANT)
    assert chat(twice, None)("a<s>b") == tuple(own)
    assert chat(tokenizer(), None)("a")[0] == USER


def test_what_a_template_does_of_its_own_is_said() -> None:
    assert chat(tokenizer(), None).remarks() == []
    (default,) = chat(tokenizer(QWEN), None).remarks()
    assert "'system You are a helpful assistant.'" in default
    assert chat(tokenizer(QWEN), "Add.").remarks() == []
    (doubled,) = chat(tokenizer("<s><s>" + LOOP), None).remarks()
    assert "'<s>' 2 times" in doubled
    (dated,) = chat(tokenizer(LOOP + "{{ strftime_now('%Y') }}"), None).remarks()
    assert "date" in dated


def test_a_bos_token_that_plain_text_has_and_the_template_leaves_out_is_said() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    assert chat(made, None)("a") == (USER, 64, ASSISTANT)
    (missing,) = chat(made, None).remarks()
    assert "no '<s>'" in missing


def test_a_template_of_ones_own_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    bare = tokenizer(None)
    bare.save_pretrained(tmp_path / "bare")
    file = tmp_path / "my.jinja"
    file.write_text("\ufeffQ: {{ messages[0].content }} A:\n", encoding="utf-8")
    made = load_tokenizer(str(tmp_path / "bare"), str(file))
    assert chat(made, None).render("1+2=") == "Q: 1+2= A:", (
        "neither the mark of UTF-8 nor the last line's end"
    )
    made.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(str(tmp_path / "saved")).chat_template == made.chat_template
    with pytest.raises(PreflightError, match=rf"model\.path={tmp_path}/bare .*model\.template="):
        load_tokenizer(str(tmp_path / "bare"))


def test_a_template_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jinja").write_text(" \n")
    (tmp_path / "latin.jinja").write_bytes(b"caf\xe9")
    for file in ("missing.jinja", "empty.jinja", "latin.jinja", ".", "x" * 5000, "~nobody-of-that-name/x"):
        path = file if file[0] == "~" else f"{tmp_path}/{file}"
        with pytest.raises(PreflightError, match=r"^model\.template="):
            with_template(byte_tokenizer(), path)
    assert with_template(byte_tokenizer(), None).chat_template == TEMPLATE


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"model": 3}', "version https://git-lfs.github.com/spec/v1"]
)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, damage: str) -> None:
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(damage)
    with pytest.raises(PreflightError, match=rf"^model\.path={tmp_path} "):
        load_tokenizer(str(tmp_path))


# Responses.


def test_a_judge_reads_every_special_token_but_the_end_token_at_the_end() -> None:
    read = response_text(tokenizer(), {END})
    said = lambda text: read(tokenizer().encode(text, add_special_tokens=False))
    assert said("<think>1+2<|end|>") == "<think>1+2"
    assert said("1<|end|>2<|pad|>") == "1<|end|>2<|pad|>", "what is within, and what no end is, is seen"
    assert said("<|user|> a , b . <|end|>") == "<|user|> a , b . ", "and no space is tidied away"
    assert said("<|end|><|end|>") == "<|end|>" and said("<|end|>") == said("") == ""


def test_end_tokens_are_the_tokenizers_and_those_of_the_generation_config(tmp_path: Path) -> None:
    def saved(name: str, **files: dict[str, Any]) -> str:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / f"{file}.json").write_text(json.dumps(content))
        return str(folder)

    llama = {"model_type": "llama", "eos_token_id": [PAD, 9]}
    assert end_ids(tokenizer()) == (END,)
    assert end_ids(tokenizer(), saved("list", generation_config={"eos_token_id": [END, PAD]})) == (END, PAD)
    assert end_ids(tokenizer(), saved("one", generation_config={"eos_token_id": PAD})) == (END, PAD)
    assert end_ids(tokenizer(), saved("none", generation_config={"temperature": 0.5})) == (END,)
    assert end_ids(tokenizer(), saved("config", config=llama)) == (END, PAD, 9)
    endless = tokenizer()
    endless.eos_token = None
    assert end_ids(endless) == () and end_ids(endless, str(tmp_path / "one")) == (PAD,)


def test_a_token_has_its_text_its_name_or_its_id() -> None:
    named = [token_name(tokenizer(), token) for token in (64, 127, END, THINK, 4000)]
    assert named == ["a", "⟨Ã⟩", "<|end|>", "<think>", "⟨4000⟩"]


def test_special_tokens_are_read_in_a_frame_and_never_in_what_is_put_into_it() -> None:
    encode = encode_frame(tokenizer())
    a, b, equals = (tokenizer().encode(x)[0] for x in "ab=")
    spelt = tokenizer().encode("<think>", split_special_tokens=True)
    assert encode("<think>={answer}<|user|>", "a") == [THINK, equals, a, USER]
    assert encode("<think>{answer}b", "<think>") == [THINK, *spelt, b] and len(spelt) == 7
    assert encode("{answer}", "a=b") == [a, equals, b] and encode("{answer}", "") == []
    assert encode("{answer}b{answer}", "a") == [a, b, a]


def test_an_engine_that_reads_other_tokens_under_the_same_path_is_refused_by_name() -> None:
    here, more, other = byte_tokenizer(), byte_tokenizer(), byte_tokenizer()
    more.add_tokens(["<tool>"])
    other.chat_template = "{{ messages }}"
    same = {"generator 0": vocabulary_hash(here), "generator 1": vocabulary_hash(other)}
    check_vocabularies(here, same, "/model")
    other.add_special_tokens({"additional_special_tokens": [other.convert_ids_to_tokens(65)]})
    assert len({vocabulary_hash(each) for each in (here, more, other)}) == 3
    said = rf"model\.path=/model: generator 2 \({vocabulary_hash(more)}\) .*\({vocabulary_hash(here)}\)"
    with pytest.raises(PreflightError, match=said):
        check_vocabularies(here, same | {"generator 2": vocabulary_hash(more)}, "/model")

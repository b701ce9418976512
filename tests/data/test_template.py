"""The checkpoint's own text: ids of the goldens, masks written by hand, and templates that are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mole_jax.config import DataConfig
from mole_jax.data.conversation import Example, Turn, encode
from mole_jax.data.prompt import with_prompt
from mole_jax.data.template import Template
from mole_jax.data.tiling.pictures import layouts
from mole_jax.errors import UserError
from mole_jax.image_spec import ImageSpec
from mole_jax.prompts import PROMPTS, chat_template
from mole_jax.tokenizer import Tokenizer
from tests.data.families import CASES, SPECS, Golden

CHATML = (
    "{% for m in messages %}<|im_start|>{{m.role}}\n{% for c in m.content %}{% if c.type == 'image' %}<image>\n"
    "{% else %}{{c.text}}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SUPERVISED = {
    "wide": ("A man ironing clothes.",),
    "tall": ("No.", "Yes, sure."),
    "two": ("The first.",),
    "text": ("3,141.59 %",),
}
"""What a model is taught in each case, but for the token that ends an answer."""
ENDS = {"llava_next_vicuna": "</s>", "llava_next_mistral": "</s>", "smolvlm": "<end_of_utterance>"}
SPACED = ("llava_next_vicuna", "llava_next_mistral", "smolvlm")
"""Their prompt ends at a colon or bracket, so that the space after it is the answer's."""
LLAVA_15 = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
"""As llava-hf/llava-1.5-7b-hf has it in chat_template.json: it writes nothing where an answer ends."""


LLAVA_16_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ '<<SYS>>\n' + message['content'][0]['text'] + "
    "'\n<</SYS>>\n\n' }}{% elif message['role'] == 'user' %}{{ '[INST] ' }}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'text') %}{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] "
    "== 'assistant' %}{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}{% else %}{{ raise_exception('Only user and "
    "assistant roles are supported!') }}{% endif %}{% endfor %}"
)
"""As llava-hf/llava-v1.6-mistral-7b-hf has it."""


ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}{% for content in message['content'] | "
    "selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""As llava-hf/llava-onevision-qwen2-0.5b-ov-hf has it: it asks with "assistant", and writes "assistant " in a turn."""


@pytest.fixture(params=SPECS)
def golden(request, reference) -> Golden:
    return Golden(reference(f"families/{request.param}"))


@pytest.fixture
def folder(reference, tmp_path):
    """Returns a function that makes a checkpoint's folder with another chat template."""

    def make(text: str | None = None, config: dict | None = None, **tokenizer):
        source = reference("families/llava_qwen2")
        shutil.copy(source / "tokenizer.json", tmp_path)
        settings = json.loads((source / "tokenizer_config.json").read_text()) | tokenizer
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        if config is not None:
            (tmp_path / "config.json").write_text(json.dumps(config))
        if text is not None:
            (tmp_path / "chat_template.jinja").write_text(text)
        return tmp_path

    return make


def turns_of(case: dict) -> list[tuple[str, str]]:
    """A case's messages as the turns of a LLaVA record, with marks and line ends as those have them."""
    words = {"image": lambda part: "<image>\n", "text": lambda part: part["text"]}
    return [(one["role"], "".join(words[p["type"]](p) for p in one["content"])) for one in case["messages"]]


def load(path) -> Template:
    return Template.load(Tokenizer.load(path), 6)


def taught(template: Template, turns, path) -> str:
    """The supervised tokens as text, special ones written out, by the tokenizers library."""
    import tokenizers

    ids, mask = template.encode(turns, [])
    whole = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    return whole.decode(ids[mask == 1].tolist(), skip_special_tokens=False)


@pytest.mark.parametrize("case", CASES)
def test_ids_are_those_of_the_golden(golden, case):
    template, turns = load(golden.folder), turns_of(golden.cases[case])
    found = layouts(golden.spec, [one.size for one in golden.pictures(case)], template.image_text)
    ids, mask = template.encode(turns, found)
    np.testing.assert_array_equal(ids, golden.expected[f"{case}/input_ids"])
    prompt = template.encode_prompt(turns[:-1], found)
    np.testing.assert_array_equal(prompt, golden.expected[f"{case}/prompt_ids"])
    # What is asked is what was trained on, up to the answer.
    np.testing.assert_array_equal(ids[: len(prompt)], prompt)
    assert mask.dtype == np.int32
    assert mask[len(prompt)] == 1


@pytest.mark.parametrize("case", CASES)
def test_answers_and_the_token_after_each_are_supervised_and_nothing_else(golden, case):
    import tokenizers

    template = load(golden.folder)
    found = layouts(golden.spec, [one.size for one in golden.pictures(case)], template.image_text)
    ids, mask = template.encode(turns_of(golden.cases[case]), found)
    whole = tokenizers.Tokenizer.from_file(str(golden.folder / "tokenizer.json"))
    starts = np.flatnonzero(np.diff(mask, prepend=0) == 1)
    ends = np.flatnonzero(np.diff(mask, append=0) == -1) + 1
    said = [whole.decode(ids[a:b].tolist(), skip_special_tokens=False) for a, b in zip(starts, ends, strict=True)]
    end, space = ENDS.get(golden.name, "<|im_end|>"), " " * (golden.name in SPACED)
    assert said == [f"{space}{answer}{end}" for answer in SUPERVISED[case]]
    assert template.ending_ids == (whole.token_to_id(end),)


def test_transformers_own_processor_makes_the_same_of_pictures_and_words(golden):
    """Those processors that need no torch; the others have a part for video that needs torchvision."""
    if golden.name not in ("llava_qwen2", "llava_qwen3", "llava_next_vicuna", "llava_next_mistral"):
        pytest.skip("transformers' processor of this family needs torchvision; the goldens stand for it")
    from transformers import AutoProcessor

    from mole_jax.data.tiling.pictures import cut

    processor, template = AutoProcessor.from_pretrained(golden.folder), load(golden.folder)
    for case in golden.cases.values():
        pictures, text = golden.pictures(case["name"]), processor.apply_chat_template(case["messages"])
        theirs = processor(images=pictures or None, text=text, return_tensors="np")
        found = layouts(golden.spec, [one.size for one in pictures], template.image_text)
        np.testing.assert_array_equal(template.encode(turns_of(case), found)[0], theirs["input_ids"][0])
        for i, picture in enumerate(pictures):
            mine = cut(picture, golden.spec, len(pictures)) / 255
            mine = np.moveaxis((mine - np.array(golden.spec.mean)) / np.array(golden.spec.std), -1, 1)
            values = theirs["pixel_values"][i]
            np.testing.assert_allclose(mine, (values if values.ndim == 4 else values[None])[: len(mine)], atol=1e-5)


def test_system_turns_and_several_turns_stand_as_the_template_has_them(folder):
    path = folder(CHATML)
    turns = [("system", "Be brief."), ("user", "What?"), ("assistant", "That."), ("user", "Why?"), ("assistant", "So.")]
    ids, _ = load(path).encode(turns, [])
    text = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in turns)
    assert ids.tolist() == _plain(path, text)
    assert taught(load(path), turns, path) == "That.<|im_end|>So.<|im_end|>"


def _plain(path, text: str) -> list[int]:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids


def test_several_pictures_stay_in_their_places_and_lines_between_are_the_templates(folder):
    path = folder(CHATML)
    found = layouts(SPECS["llava_qwen2"], [(5, 5)] * 3, "<image>")
    ids, _ = load(path).encode([("user", "<image>\n<image>\nOr <image>?"), ("assistant", "Yes.")], found)
    image = "<image>" * 16
    text = f"<|im_start|>user\n{image}\n{image}\nOr {image}\n?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n"
    assert ids.tolist() == _plain(path, text)


def test_a_generation_mark_says_where_an_answer_begins(folder):
    """With it no prefix is compared, so that earlier turns may be written otherwise; the end of the turn counts."""
    last = "{% if m.role == 'assistant' %}{% if m == messages[-1] %}<think></think>{% endif %}"
    answer = "{% generation %}{{c.text}}{% endgeneration %}{% else %}{{c.text}}{% endif %}"
    text = CHATML.replace("{{c.text}}", last + answer)
    path = folder(text)
    turns = [("user", "What?"), ("assistant", "That."), ("user", "Why?"), ("assistant", "So.")]
    assert taught(load(path), turns, path) == "That.<|im_end|>So.<|im_end|>"


def test_words_that_the_template_writes_before_an_answer_are_taught_where_it_is_asked_without_them(folder):
    path = folder(CHATML.replace("{% for c in", "{% if m.role == 'assistant' %}Well: {% endif %}{% for c in"))
    assert taught(load(path), [("user", "What?"), ("assistant", "That.")], path) == "Well: That.<|im_end|>"


def test_a_template_of_plain_texts_gets_plain_texts(folder):
    path = folder(
        "{% for m in messages %}[{{m.role}}] {{m.content | trim}}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    found = layouts(SPECS["llava_qwen2"], [(5, 5)], "<image>")
    ids, mask = load(path).encode([("user", "What?\n<image>"), ("assistant", "That.")], found)
    assert ids.tolist() == _plain(path, f"[user] {'<image>' * 16}\nWhat?</s>[assistant] That.</s>")
    assert mask.sum() == len(_plain(path, " That.</s>"))


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        # As the hub has them for LLaVA-1.6: Vicuna's is LLaVA-1.5's, Mistral's ends answers with misspelt words.
        (LLAVA_15, "USER: <image>\nWhat? ASSISTANT: A dog.</s>USER: Why? ASSISTANT: So.</s>"),
        (LLAVA_16_MISTRAL, "[INST] <image>\nWhat? [/INST] A dog.</s>[INST] Why? [/INST] So.</s>"),
    ],
    ids=["vicuna", "mistral"],
)
def test_an_answer_that_the_template_does_not_end_is_ended_as_llava_was_trained(folder, text, whole):
    path = folder(text, eos_token="</s>")
    template = load(path)
    turns = [("user", "<image>\nWhat?"), ("assistant", "A dog."), ("user", "Why?"), ("assistant", "So.")]
    found = layouts(SPECS["llava_qwen2"], [(5, 5)], "<image>")
    ids, mask = template.encode(turns, found)
    assert ids.tolist() == _plain(path, whole.replace("<image>", "<image>" * 16))
    assert template.ending_ids == (2,)
    assert ids[mask == 1].tolist() == _plain(path, " A dog.</s>") + _plain(path, " So.</s>")
    prompt = template.encode_prompt(turns[:-1], found)
    assert ids[: len(prompt)].tolist() == prompt.tolist()
    assert template.remark is not None
    assert "</s> takes the place" in template.remark


@pytest.mark.parametrize("marks", [True, False])
def test_an_answer_stands_as_it_is_asked_for_where_the_template_differs_by_white_space(folder, marks):
    text = ONEVISION if marks else ONEVISION.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    path = folder(text)
    template, found = load(path), layouts(SPECS["llava_qwen2"], [(5, 5)], "<image>")
    turns = [("user", "<image>\nWhat?"), ("assistant", "A dog."), ("user", "Why?"), ("assistant", "So.")]
    ids, mask = template.encode(turns, found)
    asked = f"<|im_start|>user {'<image>' * 16}\nWhat?<|im_end|><|im_start|>assistant\n"
    whole = f"{asked}A dog.<|im_end|><|im_start|>user \nWhy?<|im_end|><|im_start|>assistant\nSo.<|im_end|>"
    assert ids.tolist() == _plain(path, whole)
    assert ids[mask == 1].tolist() == _plain(path, "A dog.<|im_end|>So.<|im_end|>")
    assert template.encode_prompt(turns[:1], found).tolist() == _plain(path, asked)
    assert ids[: len(prompt := template.encode_prompt(turns[:-1], found))].tolist() == prompt.tolist()
    assert template.remark is not None
    assert "other white space before an answer" in template.remark


def test_the_goldens_templates_have_nothing_to_remark(golden):
    assert load(golden.folder).remark is None


def test_an_answer_that_is_context_alone_is_not_taught(folder):
    path = folder(CHATML)
    turns = [("user", "What?"), ("assistant", "That."), ("user", "Why?"), ("assistant", "So.")]
    ids, mask = load(path).encode(turns, [], [True, False, True, True])
    assert ids[mask == 1].tolist() == _plain(path, "So.<|im_end|>")
    assert ids.tolist() == load(path).encode(turns, [])[0].tolist()


@pytest.mark.parametrize(("answer", "first"), [("3 dogs.", " 3"), ("(No dog.)", "(")])
def test_a_space_that_ends_the_prompt_is_taught_only_as_part_of_the_answers_first_token(folder, answer, first):
    turn = "{% if add_generation_prompt %}<|im_start|>assistant"
    path = folder(CHATML.replace(f"{turn}\n", f"{turn}: ").replace("{{m.role}}\n", "{{m.role}}: "))
    ids, mask = load(path).encode([("user", "What?"), ("assistant", answer)], [])
    assert ids[int(np.flatnonzero(mask)[0])] == _plain(path, first)[0]
    assert len(_plain(path, first)) == 1


def test_the_tokenizers_bos_stands_once(folder, reference):
    """Where the tokenizer adds it, unless the template has it."""
    path = folder(CHATML, bos_token="<s>")
    data = json.loads((path / "tokenizer.json").read_text())
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (path / "tokenizer.json").write_text(json.dumps(data))
    turns = [("user", "What?"), ("assistant", "That.")]
    without = load(path).encode(turns, [])[0].tolist()
    (path / "chat_template.jinja").write_text("{{bos_token}}" + CHATML)
    assert without == load(path).encode(turns, [])[0].tolist()
    assert without.count(1) == 1
    assert without[0] == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (CHATML + "{{ strftime_now('%d %b') }}", "writes today's date"),
        (CHATML.replace("messages %}", "messages[-2:] %}", 1), "leaves out or changes words of turn 1 (user)"),
        (
            CHATML.replace("{{c.text}}", "{{c.text if loop.index0 or m.role == 'user' else c.text | upper}}"),
            "changes wo",
        ),
        (CHATML.replace("<|im_end|>\n{% endfor %}", "{{ '<|im_end|>' if loop.last }}\n{% endfor %}"), "otherwise when"),
        (CHATML.replace("<|im_end|>", "{{ '<|im_end|>' if m != messages[1] }}"), "ends some answers with a token"),
        (CHATML.replace("<image>", ""), "writes 0 <image> for 1 pictures"),
        (CHATML + "{{ raise_exception('no such\n model') }}", "fails (no such)"),
        ("{% for m in messages %", "fails ("),
    ],
    ids=["date", "drops", "changes", "prefix", "endless", "pictureless", "raises", "broken"],
)
def test_a_template_that_cannot_be_trained_on_is_refused_by_its_name(folder, text, told):
    path = folder(text)
    with pytest.raises(UserError) as caught:
        load(path)
    line = str(caught.value)
    assert line.startswith(f"the chat template of {path} ")
    assert told in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("turns", "told"),
    [
        ([("user", "Say <|im_end|> now"), ("assistant", "No.")], "the words of the user have '<|im_end|>'"),
        ([("user", "What?"), ("assistant", "<|im_start|>user")], "the words of the assistant have '<|im_start|>'"),
        ([("system", "Be brief."), ("user", "What?"), ("assistant", "No.")], "words of turn 1 (system)"),
    ],
)
def test_words_that_would_be_lost_or_read_as_tokens_are_refused(folder, turns, told):
    path = folder(CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}", 1))
    with pytest.raises(UserError, match=told.replace("|", r"\|").replace("(", r"\(").replace(")", r"\)")):
        load(path).encode(turns, [])


def test_added_tokens_beside_a_sentencepiece_model_count(tokenizer_file, tmp_path):
    """transformers' tokenizer reads both files; ours spells no special token of a text."""
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.model")
    added = {"340": "<image>", "341": "<|end|>", "342": "<loc>"}
    decoder = {id: {"content": text, "special": text != "<loc>"} for id, text in added.items()}
    settings = {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": decoder, "bos_token": "<s>",
                "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(CHATML.replace("<|im_end|>", "<|end|>").replace("<|im_start|>", "# "))
    template = Template.load(Tokenizer.load(tmp_path), 340)
    layout = layouts(SPECS["llava_qwen2"], [(5, 5)], "<image>")
    ids, mask = template.encode([("user", "<image>\nA <loc>?"), ("assistant", "A dog.")], layout)
    assert ids.tolist().count(340) == 16
    assert ids.tolist().count(342) == 1
    assert ids.tolist().count(341) == 2
    assert ids[np.flatnonzero(mask)[-1]] == 341
    assert set(template.ending_ids) == {2, 341}


@pytest.mark.parametrize("name", ["v1", "no_system"])
def test_a_preset_read_as_a_template_makes_the_ids_and_the_mask_of_the_preset(tokenizer_file, tmp_path, name):
    """Our own fast path against transformers' tokenizer and the preset's Jinja form."""
    shutil.copy(tokenizer_file, tmp_path / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "LlamaTokenizer"}
    added = {"340": {"content": "<image>", "special": True}}
    settings = {**names, "added_tokens_decoder": added, "add_bos_token": True, "legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "chat_template.jinja").write_text(chat_template(PROMPTS[name]))
    own, image = Tokenizer.load(tmp_path), ImageSpec(8, 3, 340)
    template = Template.load(own, 340)
    turns = [
        ("user", "What is it?\n<image>"),
        ("assistant", "A dog on the grass."),
        ("user", "And?"),
        ("assistant", "Yes."),
    ]
    example = Example("a", "d", tuple(Turn(role, text) for role, text in turns), ("x",))
    expected = encode(example, own, PROMPTS[name], image)
    ids, mask = template.encode(turns, expected.layouts)
    assert ids.tolist() == expected.tokens.tolist()
    assert mask.tolist() == expected.loss_mask.tolist()


def test_a_template_can_be_pickled_and_used_by_threads(reference):
    template = load(reference("families/smolvlm"))
    turns = [("user", "What? " * 50), ("assistant", "That. " * 50)]
    expected = template.encode(turns, [])
    with ThreadPoolExecutor(8) as pool:
        many = pool.map(lambda _: pickle.loads(pickle.dumps(template)).encode(turns, []), range(16))
        again = pool.map(lambda _: template.encode(turns, []), range(64))
        assert all(np.array_equal(a, b) for one in [*many, *again] for a, b in zip(one, expected, strict=True))


def chosen(path) -> str:
    return str(with_prompt(DataConfig(), Tokenizer.load(path)).prompt)


def test_every_golden_is_asked_with_its_own_template(golden):
    assert chosen(golden.folder) == "checkpoint"
    named = with_prompt(DataConfig(prompt="no_system"), Tokenizer.load(golden.folder))
    assert named.prompt == "no_system"


@pytest.mark.parametrize("text", [LLAVA_15, chat_template(PROMPTS["v1"]), None], ids=["hub", "ours", "none"])
def test_llava_15_is_asked_as_vicuna(folder, text):
    config = {"model_type": "llava", "text_config": {"model_type": "llama"}}
    assert chosen(folder(text, config, eos_token="</s>")) == "v1"


@pytest.mark.parametrize("name", PROMPTS)
def test_a_preset_that_we_wrote_is_known_again(folder, name):
    known = chosen(folder(chat_template(PROMPTS[name]), {"model_type": "llava"}))
    assert known == ("v1" if name == "llava_mole" else name)


@pytest.mark.parametrize(
    ("eos", "config"),
    [
        ("<|im_end|>", {"model_type": "llava"}),
        ("</s>", {"model_type": "llava", "text_config": {"model_type": "mistral"}}),
    ],
)
def test_a_base_that_has_no_template_and_is_no_vicuna_must_name_one(folder, eos, config):
    path = folder(None, config, eos_token=eos)
    with pytest.raises(UserError, match=r"no chat template and is no Vicuna.*or name one of v1, llava_mole"):
        chosen(path)
    with pytest.raises(UserError, match="needs a chat template"):
        load(path)


def test_the_template_stands_in_any_of_three_files(folder):
    turns = [("user", "What?"), ("assistant", "That.")]
    path = folder(None, chat_template=[{"name": "tool", "template": "no"}, {"name": "default", "template": CHATML}])
    expected = load(path).encode(turns, [])[0].tolist()
    (path / "chat_template.json").write_text(json.dumps({"chat_template": CHATML.replace("<|im_start|>", "# ")}))
    second = load(path).encode(turns, [])[0].tolist()
    (path / "chat_template.jinja").write_text(CHATML)
    assert load(path).encode(turns, [])[0].tolist() == expected != second
    (path / "chat_template.jinja").unlink()
    (path / "chat_template.json").unlink()
    with pytest.raises(UserError, match="has no template of the name 'default'"):
        load(folder(None, chat_template=[{"name": "tool", "template": "no"}]))


def test_transformers_is_not_imported_for_llava_15(folder):
    path = folder(LLAVA_15, {"model_type": "llava"}, eos_token="</s>")
    code = (
        "import sys; from mole_jax.config import DataConfig; from mole_jax.data import prompt, template, load, mixture;"
        f"from mole_jax.tokenizer import Tokenizer; tokenizer = Tokenizer.load({str(path)!r});"
        "print(prompt.with_prompt(DataConfig(), tokenizer).prompt, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["v1", "False"]

"""What an export says to transformers about words and pictures, against what is made of them here.

The model itself in transformers: test_torch.py.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import load_file

import mole_jax
from mole_jax.clip import CLIP_MEAN, CLIP_STD
from mole_jax.config import DataConfig
from mole_jax.data.conversation import Example, Turn, encode, encode_prompt
from mole_jax.data.image import load_image
from mole_jax.data.load import taken
from mole_jax.errors import UserError
from mole_jax.evaluation.checkpoint import with_own_prompt
from mole_jax.model.architecture import PRESETS
from mole_jax.prompts import IMAGE, PROMPTS
from mole_jax.tokenizer import Tokenizer
from mole_jax.weights.convert import convert
from mole_jax.weights.hf_folder import Beside
from mole_jax.weights.hf_tokenizer import from_sentencepiece
from mole_jax.weights.open import open_source
from tests.tiny import TOKENIZER
from tests.weights.runs import leaves_of, logits, trained_run

ARCH = PRESETS["quickstart"]
QUESTION = f"{IMAGE}\nWhat  is on the right? 12,345 é 😀\nAnswer shortly. "
CONVERSATIONS = {
    "question": [QUESTION],
    "image last": [f" What is it? {IMAGE} "],
    "answer": [QUESTION, "A dog."],
    "later image": ["Hello ", " Yes.\n", f"{IMAGE}And now?", "", "Sure?\n\n  "],
    "two images": [f"{IMAGE}\n{IMAGE}\nWhich of the two?", "The first."],
    "no image": [" What is 2 + 2?"],
}
CAPTION = {"question": [f"{IMAGE}\nDescribe this."], "answer": [f"{IMAGE}\nDescribe this.", "A dog.\nIt is red. "]}


def turns(words: list[str]) -> tuple[Turn, ...]:
    return tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(words))


def messages(words: list[str], picture: Image.Image) -> list[dict]:
    """The same conversation as transformers wants it: parts, an image where an ``<image>`` is (with its line break)."""
    found = []
    for turn in turns(words):
        first, *rest = turn.text.split(IMAGE)
        parts = [{"type": "text", "text": first}]
        for text in rest:
            parts += [{"type": "image", "image": picture}, {"type": "text", "text": text.removeprefix("\n")}]
        found.append({"role": turn.role, "content": parts})
    return found


def our_ids(words: list[str], tokenizer: Tokenizer, prompt: str, arch=ARCH) -> np.ndarray:
    said = turns(words)
    if said[-1].role == "user":
        return encode_prompt(said, tokenizer, PROMPTS[prompt], arch.image)
    images = tuple("x" for turn in said for _ in range(turn.text.count(IMAGE)))
    return encode(Example("id", "domain", said, images), tokenizer, PROMPTS[prompt], arch.image).tokens


def auto_processor(folder: Path):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder)


def their_inputs(processor, words: list[str], picture: Image.Image) -> dict[str, np.ndarray]:
    return processor.apply_chat_template(
        messages(words, picture),
        add_generation_prompt=len(words) % 2 == 1,
        tokenize=True,
        return_dict=True,
        return_tensors="np",
    )


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A picture of noise that is wider than high, so that padding, cropping and resizing all show."""
    file = tmp_path_factory.mktemp("picture") / "wide.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (75, 190, 3), np.uint8)).save(file)
    return file


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Returns a function that gives a run's folder, with its tokenizer, by kind, prompt and aspect."""

    def run(kind: str, prompt: str = "v1", image_aspect: str = "pad") -> Path:
        folder = tmp_path_factory.mktemp("run")
        trained_run(folder, TOKENIZER, kind=kind, prompt=prompt, image_aspect=image_aspect)
        Tokenizer.load(TOKENIZER).save(folder)
        return folder

    return run


@pytest.mark.parametrize(
    ("kind", "to", "prompt", "aspect"),
    [
        ("lora", "hf", "v1", "pad"),
        ("mole", "hf", "llava_mole", "crop"),
        ("lora", "peft", "no_system", "crop"),
        ("lora", "hf", "plain", "pad"),
    ],
)
def test_auto_processor_gives_our_ids_and_pixels(runs, picture, tmp_path, kind, to, prompt, aspect):
    run, out = runs(kind, prompt, aspect), tmp_path / "out"
    convert(str(run), str(out), to)
    processor, tokenizer = auto_processor(out), Tokenizer.load(run)
    assert {"tokenizer.json", "tokenizer.model", "chat_template.jinja"} <= {file.name for file in out.iterdir()}
    shown = Image.open(picture)
    for name, words in (CAPTION if prompt == "plain" else CONVERSATIONS).items():
        theirs = their_inputs(processor, words, shown)
        np.testing.assert_array_equal(theirs["input_ids"][0], our_ids(words, tokenizer, prompt), err_msg=name)
        # In two steps, as many programs do it, the same: nothing is added twice.
        text = processor.apply_chat_template(messages(words, shown), add_generation_prompt=len(words) % 2 == 1)
        count = sum(one.count(IMAGE) for one in words)
        again = processor(text=text, images=[shown] * count or None, return_tensors="np")
        np.testing.assert_array_equal(again["input_ids"], theirs["input_ids"], err_msg=name)
        assert ("pixel_values" in theirs) == (count > 0)
        for pixels in theirs["pixel_values"] if count else ():
            levels = (pixels.transpose(1, 2, 0) * CLIP_STD + CLIP_MEAN) * 255
            ours = load_image(picture.name, picture.parent, size=ARCH.image.size, aspect=aspect, max_pixels=10**6)
            np.testing.assert_allclose(levels, ours, atol=1e-3)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_plain_text_begins_with_bos_as_in_training(picture, tmp_path, prompt):
    """Given to the processor without the chat template, as in the examples of transformers' documentation."""
    Beside.of(ARCH, tokenizer=TOKENIZER, prompt=prompt).write(tmp_path)
    own, processor = Tokenizer.load(TOKENIZER), auto_processor(tmp_path)
    before, after = "USER: ", "\nWhat is on the right? ASSISTANT:"
    found = processor(text=f"{before}{IMAGE}{after}", images=Image.open(picture), return_tensors="np")["input_ids"][0]
    images = [ARCH.image_token_id] * ARCH.image_span
    first = [] if prompt == "llava_mole" else [own.bos_id]
    assert found.tolist() == [*first, *own.encode(before)[0], *images, *own.encode(after)[0]]


def test_special_tokens_in_a_question_are_words_where_transformers_is_asked_for_it(tmp_path, picture):
    """transformers does so only where the tokenizer adds nothing: BOS is then the caller's to add."""
    Beside.of(ARCH, tokenizer=TOKENIZER, prompt="v1").write(tmp_path)
    words, shown = [f"{IMAGE}\nIs </s> or <pad> here, or <0x41>?"], Image.open(picture)
    ours, processor = our_ids(words, Tokenizer.load(TOKENIZER), "v1"), auto_processor(tmp_path)
    assert 2 not in ours
    said, flags = messages(words, shown), {"add_generation_prompt": True, "tokenize": True}
    assert 2 in processor.apply_chat_template(said, **flags)[0]
    words = processor.apply_chat_template(said, sanitize_control_tokens=True, add_special_tokens=False, **flags)[0]
    np.testing.assert_array_equal([processor.tokenizer.bos_token_id, *words], ours)


def test_words_that_no_template_has_a_place_for_are_refused(runs, picture, tmp_path):
    for prompt, words, message in (
        ("v1", ["What?", f"A {IMAGE}"], "of the assistant and without images"),
        ("plain", ["What?"], "takes one image"),
        ("plain", [f"{IMAGE}", "A dog.", "And?"], "takes one image"),
    ):
        convert(str(runs("lora", prompt)), str(tmp_path / f"{prompt}{len(words)}"), "hf")
        processor = auto_processor(tmp_path / f"{prompt}{len(words)}")
        with pytest.raises(Exception, match=message):
            their_inputs(processor, words, Image.open(picture))
    with pytest.raises(Exception, match="a message is of the user"):
        auto_processor(tmp_path / "v12").apply_chat_template([{"role": "system", "content": "Be kind."}])


def test_an_export_becomes_a_run_with_the_same_words(runs, picture, tmp_path):
    run = runs("lora", "no_system", "crop")
    convert(str(run), str(tmp_path / "hf"), "hf", "float32")
    convert(str(tmp_path / "hf"), str(tmp_path / "run"), "run")
    convert(str(tmp_path / "run"), str(tmp_path / "hf2"), "hf")
    convert(str(run), str(tmp_path / "peft"), "peft")
    expected = our_ids([QUESTION], Tokenizer.load(run), "no_system")
    for name in ("hf", "run", "hf2", "peft"):
        source = open_source(str(tmp_path / name))
        assert (source.prompt, source.image_aspect) == ("no_system", "crop"), name
        _, processor = mole_jax.load(str(tmp_path / name))
        np.testing.assert_array_equal(processor(QUESTION, picture).tokens, expected, err_msg=name)
    kept = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json", "processor_config.json")
    for file in kept:
        assert (tmp_path / "hf2" / file).read_bytes() == (tmp_path / "hf" / file).read_bytes(), file
    # Where only tokenizer.json is left, it is read in the same way.
    (tmp_path / "hf" / "tokenizer.model").unlink()
    np.testing.assert_array_equal(our_ids([QUESTION], Tokenizer.load(tmp_path / "hf"), "no_system"), expected)
    convert(str(tmp_path / "hf"), str(tmp_path / "hf3"), "hf")
    theirs = their_inputs(auto_processor(tmp_path / "hf3"), [QUESTION], Image.open(picture))
    np.testing.assert_array_equal(theirs["input_ids"][0], expected)


def test_images_are_read_as_in_training_wherever_the_weights_go(tmp_path):
    run, picture = tmp_path / "run", tmp_path / "turned.png"
    trained_run(run, TOKENIZER, kind="lora", arch={"exif": "apply", "transparency": "white"})
    Tokenizer.load(TOKENIZER).save(run)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGBA", (40, 20), (10, 20, 30, 0)).save(picture, exif=exif)
    upright = tmp_path / "upright.png"
    Image.new("RGB", (20, 40), (255, 255, 255)).save(upright)
    convert(str(run), str(tmp_path / "hf"), "hf", "float32")
    convert(str(tmp_path / "hf"), str(tmp_path / "again"), "run")
    convert(str(run), str(tmp_path / "peft"), "peft")
    for name in ("run", "hf", "again", "peft"):
        _, processor = mole_jax.load(str(tmp_path / name))
        expected = processor(QUESTION, upright).images
        for one in (picture, Image.open(picture)):
            np.testing.assert_array_equal(processor(QUESTION, one).images, expected, err_msg=name)
    held = with_own_prompt(DataConfig(exif="ignore"), open_source(str(run)))
    assert taken(held, open_source(str(run)).architecture.image).exif == "apply"


def test_all_ids_that_end_an_answer_and_the_padding_are_told(runs, tmp_path):
    base = shutil.copytree(TOKENIZER, tmp_path / "base")
    generation = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [2, 270]}))
    for kind, to in (("lora", "hf"), ("mole", "hf"), ("lora", "peft")):
        trained_run(tmp_path / kind / to / "run", base, kind=kind)
        Tokenizer.load(TOKENIZER).save(tmp_path / kind / to / "run")
        out = tmp_path / kind / to / "out"
        convert(str(tmp_path / kind / to / "run"), str(out), to)
        told = json.loads((out / "generation_config.json").read_text())
        assert told == {"bos_token_id": 1, "eos_token_id": [2, 270], "pad_token_id": 510}
        tokenizer = auto_processor(out).tokenizer
        assert tokenizer.convert_tokens_to_ids([IMAGE, "<pad>", "</s>"]) == [511, 510, 2]
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (510, 2, 1)
        if to == "hf":
            config = json.loads((out / "config.json").read_text())
            assert config["image_token_index"] == 511
            text = config["text_config"]
            assert (text["vocab_size"], text["pad_token_id"], text["eos_token_id"]) == (512, 510, [2, 270])


def test_a_full_embedding_grows_and_old_logits_stay(goldens, tmp_path):
    """Pieces up to the last row but the image's: there is no row for ``<pad>``."""
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads((goldens / "tiny_llava" / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"image_token_index": 351}))
    shutil.copy(goldens / "tiny_llava" / "model.safetensors", base)
    _json_tokenizer(base, 351)
    spec, leaves = trained_run(tmp_path / "run", base, kind="lora")
    Tokenizer.load(base).save(tmp_path / "run")
    convert(str(tmp_path / "run"), str(tmp_path / "hf"), "hf", "float32")
    tokenizer = auto_processor(tmp_path / "hf").tokenizer
    assert tokenizer.convert_tokens_to_ids([IMAGE, "<pad>"]) == [351, 352]
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        assert tensors[name].shape == (384, 64)
        np.testing.assert_allclose(tensors[name][352:], np.tile(tensors[name][:352].mean(0), (32, 1)), atol=1e-6)
    grown_spec, grown = leaves_of(tmp_path / "hf")
    found, expected = logits(grown_spec, grown), logits(spec, leaves)
    np.testing.assert_allclose(found[..., :352], expected, atol=1e-4, rtol=1e-4)
    assert (found[..., 352:].max(-1) < expected.max(-1)).all()
    # An adapter cannot change its base's embedding, so the tokenizer's own padding is what is left.
    convert(str(tmp_path / "run"), str(tmp_path / "peft"), "peft")
    assert auto_processor(tmp_path / "peft").tokenizer.pad_token == "</s>"


def _json_tokenizer(folder: Path, size: int, scheme: str = "first") -> None:
    """A tokenizer.json of BPE with exactly `size` ids, whose words have their space in front."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    model.decoder = tokenizers.decoders.Metaspace()
    special = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = [f"w{number:03} and ASSISTANT: USER: What is shown here?" for number in range(400)]
    model.train_from_iterator(
        words, tokenizers.trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    values = json.loads(model.to_str())
    assert len(values["model"]["vocab"]) == size
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    whole = [bos, {"Sequence": {"id": "A", "type_id": 0}}]
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": whole,
        "pair": [*whole, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    values["added_tokens"] = [one for one in values["added_tokens"] if one["content"] in ("<s>", "</s>")]
    (folder / "tokenizer.json").write_text(json.dumps(values))


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_a_tokenizer_json_keeps_its_ids(picture, tmp_path, scheme):
    """Texts after an image and after an answer begin as here, and BOS stands there once."""
    (tmp_path / "base").mkdir()
    _json_tokenizer(tmp_path / "base", 340, scheme)
    beside = Beside.of(ARCH, tokenizer=tmp_path / "base", prompt="v1")
    beside.write(tmp_path / "out")
    processor = auto_processor(tmp_path / "out")
    for words in CONVERSATIONS.values():
        theirs = their_inputs(processor, words, Image.open(picture))["input_ids"][0]
        np.testing.assert_array_equal(theirs, our_ids(words, Tokenizer.load(tmp_path / "base"), "v1"))


def test_the_bases_own_template_stays_where_no_preset_is_known(picture, tmp_path):
    """Also its BOS, which the tokenizer puts there because the template does not."""
    base = shutil.copytree(TOKENIZER, tmp_path / "base")
    theirs = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    (base / "tokenizer_config.json").write_text(json.dumps({"chat_template": theirs, "pad_token": "<unk>"}))
    convert(str(base), str(tmp_path / "hf"), "hf")
    processor = auto_processor(tmp_path / "hf")
    said = processor.apply_chat_template([{"role": "user", "content": "What?"}], tokenize=True)
    own = Tokenizer.load(base)
    assert said[0] == [own.bos_id, *own.encode("[user]What?")[0]]
    # So does a tokenizer.json keep what it puts before a text.
    (tmp_path / "json").mkdir()
    _json_tokenizer(tmp_path / "json", 340)
    (tmp_path / "json" / "chat_template.jinja").write_text(theirs)
    Beside.of(ARCH, tokenizer=tmp_path / "json").write(tmp_path / "json_out")
    said = auto_processor(tmp_path / "json_out").apply_chat_template([{"role": "user", "content": "a"}], tokenize=True)
    assert said[0] == [0, *Tokenizer.load(tmp_path / "json").encode("[user]a")[0]]
    # A run that was trained with a preset is asked in its words.
    trained_run(tmp_path / "run", base, kind="lora", prompt="v1")
    own.save(tmp_path / "run")
    convert(str(tmp_path / "run"), str(tmp_path / "hf2"), "hf")
    found = their_inputs(auto_processor(tmp_path / "hf2"), [QUESTION], Image.open(picture))["input_ids"][0]
    np.testing.assert_array_equal(found, our_ids([QUESTION], own, "v1"))


@pytest.mark.parametrize("family", ["llava_next_vicuna", "llava_next_mistral", "llava_qwen2", "internvl"])
def test_tokenizers_of_others(reference, tmp_path, picture, family):
    """Under their own template the prompt that transformers made of the base itself; under a preset, our ids."""
    base, name = reference(f"families/{family}"), "text"
    config = json.loads((base / "config.json").read_text())
    image = config.get("image_token_index", config.get("image_token_id"))
    decoder = dataclasses.replace(ARCH.decoder, vocab=config["text_config"]["vocab_size"])
    arch = dataclasses.replace(ARCH, image_token_id=image, decoder=decoder)
    Beside.of(arch, tokenizer=base).write(tmp_path / "own")
    (case,) = [one for one in json.loads((base / "cases.json").read_text())["cases"] if one["name"] == name]
    asked = auto_processor(tmp_path / "own")
    prompt = asked.apply_chat_template(case["messages"][:1], add_generation_prompt=True)
    assert prompt == case["prompt"]
    ids = asked.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    with np.load(base / "expected.npz") as golden:
        np.testing.assert_array_equal(ids, golden[f"{name}/prompt_ids"].ravel())
    Beside.of(arch, tokenizer=base, prompt="v1").write(tmp_path / "v1")
    processor, own = auto_processor(tmp_path / "v1"), Tokenizer.load(base)
    for words in CONVERSATIONS.values():
        theirs = their_inputs(processor, words, Image.open(picture))["input_ids"][0]
        np.testing.assert_array_equal(theirs, our_ids(words, own, "v1", arch))


def test_an_image_token_beyond_the_embedding_gets_a_row():
    """As in a released LLaVA-MoLE file, whose embedding is Vicuna's."""
    decoder = dataclasses.replace(ARCH.decoder, vocab=500)
    arch = dataclasses.replace(ARCH, image_token_id=500, decoder=decoder)
    beside = Beside.of(arch, tokenizer=TOKENIZER)
    assert (beside.architecture.decoder.vocab, beside.architecture.decoder.pad_id) == (512, 499)
    embedding, head = np.random.default_rng(0).normal(size=(500, 4)), np.random.default_rng(1).normal(size=(4, 500))
    grown = beside.leaves({"decoder/embedding": embedding, "decoder/head/kernel": head})
    for whole, axis, path in ((embedding, 0, "decoder/embedding"), (head, 1, "decoder/head/kernel")):
        found = np.moveaxis(np.asarray(grown[path]), axis, 0)
        np.testing.assert_array_equal(found[:500], np.moveaxis(whole, axis, 0))
        np.testing.assert_allclose(found[500:], np.tile(whole.mean(axis), (12, 1)), atol=1e-6)


def test_tokens_that_do_not_fit_the_model_are_refused(goldens, tmp_path, tokenizer_file):
    with pytest.raises(UserError, match=r"has the word '.*' as 320, where the model has images"):
        Beside.of(open_source(str(goldens / "tiny_llava")).architecture, tokenizer=tokenizer_file.parent)
    (tmp_path / "tokenizer.model").write_bytes(Path(TOKENIZER, "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({IMAGE: 487}))
    with pytest.raises(UserError, match=r"has <image> as 487, the model as 511"):
        Beside.of(ARCH, tokenizer=tmp_path)


def test_tokens_that_are_there_are_kept(tmp_path):
    """Names, ids and marks of a base that has them already, and words added beside its model."""
    (tmp_path / "tokenizer.model").write_bytes(Path(TOKENIZER, "tokenizer.model").read_bytes())
    added = {
        "487": {"content": "<fig>", "special": True},
        "488": {"content": "[none]", "special": True},
        "490": {"content": "<loc>", "special": False, "rstrip": True},
    }
    config = {"added_tokens_decoder": added, "pad_token": "[none]", "padding_side": "right"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    arch = dataclasses.replace(ARCH, image_token_id=487)
    Beside.of(arch, tokenizer=tmp_path, prompt="v1").write(tmp_path / "out")
    processor = auto_processor(tmp_path / "out")
    assert (processor.image_token, processor.image_token_id) == ("<fig>", 487)
    assert (processor.tokenizer.pad_token, processor.tokenizer.pad_token_id) == ("[none]", 488)
    assert processor.tokenizer.padding_side == "right"
    own = Tokenizer.load(tmp_path)
    text = "It is <loc> red."
    assert 490 in own.encode(text)[0]
    assert processor.tokenizer(text)["input_ids"] == [own.bos_id, *own.encode(text)[0]]


WORDS = st.lists(
    st.one_of(
        st.text(max_size=8),
        st.sampled_from(
            ["USER:", " the", "  ", "\n", "12", " assistant's", "▁", "aaaa", "\t", "</s>", "<unk>", "<0x41>"]
        ),
    )
).map("".join)


@given(text=WORDS)
def test_tokenizer_json_makes_the_ids_of_a_sentencepiece_model(text, tokenizer_file):
    for file in (tokenizer_file, Path(TOKENIZER, "tokenizer.model")):
        made = _made(file)
        assert made.encode(text, add_special_tokens=False).ids == Tokenizer.load(file).encode(text)[0]


def test_tokenizer_json_makes_llamas_ids(reference, shared):
    """Those that are known from elsewhere, and of questions and answers as they occur."""
    folder = shared / "models" / "llama_tokenizer"
    made, own = _made(folder / "tokenizer.model"), Tokenizer.load(folder)
    cases = json.loads(reference("metrics/llama_tokenizer.json").read_text(encoding="utf-8"))
    records = json.loads((shared / "data" / "biomedical" / "train.json").read_text())
    asked = [turn["value"] for record in records[:300] for turn in record["conversations"]]
    for group in ("llama_tokenizer_js", "transformers_plain"):
        for text, ids, *_ in cases[group]:
            assert [own.bos_id, *made.encode(text, add_special_tokens=False).ids] == ids, text
    for text in (*asked, "   a  aa aaa aaaa\n\n\n  b", "é😀 " * 7):
        assert made.encode(text, add_special_tokens=False).ids == own.encode(text)[0], text


def _made(file: Path) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer.from_str(json.dumps(from_sentencepiece(file.read_bytes(), where=str(file))))
    made.encode_special_tokens = True
    return made


def test_sentencepiece_models_that_tokenizer_json_has_no_place_for(tmp_path):
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["It is red and round."] * 20),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=18,
        user_defined_symbols=["[x]"],
        minloglevel=2,
    )
    with pytest.raises(UserError, match=r"has pieces as '\[x\]'.* name a folder with that model's own tokenizer.json"):
        from_sentencepiece((tmp_path / "tokenizer.model").read_bytes(), where="tokenizer.model")

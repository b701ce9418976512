"""`mole_jax.load` and `mole_jax.generate` on the embedded base."""

from __future__ import annotations

import base64
import io
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import mole_jax
from mole_jax.config import DecodingConfig, MeshConfig
from mole_jax.data.conversation import Turn
from mole_jax.errors import UserError
from tests.tiny import ROOT

BASE = str(ROOT / "assets" / "quickstart_base")
SHORT = DecodingConfig(max_new_tokens=6)


@pytest.fixture(scope="module")
def loaded():
    return mole_jax.load(BASE)


def png(colour) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (80, 50), colour).save(stream, "PNG")
    return stream.getvalue()


def test_generate_answers_with_and_without_images_in_any_batch(loaded):
    model, processor = loaded
    prompts = ["<image>\nDescribe the picture.", "Repeat: left lung", "What is on the left?"]
    images = [[png((0, 0, 0))], [], [png((255, 255, 255))]]
    answers = mole_jax.generate(model, processor, prompts, images, decoding=SHORT)
    assert all(isinstance(answer, str) for answer in answers)
    alone = [
        mole_jax.generate(model, processor, [prompt], [own], decoding=SHORT)[0]
        for prompt, own in zip(prompts, images, strict=True)
    ]
    assert answers == alone


def test_one_question_is_one_question(loaded):
    """A string is no list of letters, and one image no list of anything."""
    model, processor = loaded
    (answer,) = mole_jax.generate(model, processor, ["Describe the picture."], [[png((255, 0, 0))]], decoding=SHORT)
    for images in (png((255, 0, 0)), [png((255, 0, 0))]):
        assert mole_jax.generate(model, processor, "Describe the picture.", images, decoding=SHORT) == [answer]
    several = mole_jax.generate(
        model, processor, ("Repeat: left lung", "Describe the picture."), [None, png((255, 0, 0))], decoding=SHORT
    )
    assert several[1] == answer
    assert mole_jax.generate(model, processor, [], decoding=SHORT) == []


def test_an_image_is_the_same_in_every_form(loaded, tmp_path):
    _, processor = loaded
    array = np.random.default_rng(0).integers(0, 256, (50, 80, 3), np.uint8)
    picture, file = Image.fromarray(array), tmp_path / "a.png"
    picture.save(file)
    expected = processor("What?", [file.read_bytes()]).images
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.info["exif"] = turned.tobytes()
    url = "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()
    forms = (str(file), file, picture, Image.open(file), array, array[::-1][::-1], [array], (file,), url, [url])
    for form in forms:
        np.testing.assert_array_equal(processor("What?", form).images, expected, err_msg=repr(form)[:40])
    # Modes go the way that they go from a file.
    for mode in ("L", "P", "CMYK", "RGBA", "1", "LA", "I;16"):
        converted = Image.fromarray(array[..., 0].astype(np.uint16) * 257) if mode == "I;16" else picture.convert(mode)
        stored = tmp_path / f"{mode.replace(';', '')}.{'tiff' if mode in ('CMYK', 'I;16') else 'png'}"
        converted.save(stored, **({} if mode in ("CMYK", "I;16") else {"exif": b""}))
        np.testing.assert_array_equal(processor("What?", converted).images, processor("What?", stored).images)


def test_a_picture_of_the_web_is_not_fetched(loaded):
    with pytest.raises(UserError, match=r"image 'https://example.com/a.png' is on the web, .* download it first"):
        loaded[1]("What?", "https://example.com/a.png")


@pytest.mark.parametrize(
    ("prompts", "images", "message"),
    [
        (7, None, "prompts is int 7, expected a string or a list of strings"),
        (["a", 7], None, r"prompts\[1\] is int 7, expected a string"),
        ([["a"]], None, r"prompts\[0\] is list \['a'\], expected a string"),
        (b"a", None, "prompts is bytes b'a', expected a string"),
        (["a", "b"], "a.png", "images is str 'a.png', but prompts is a list; give a list with an entry for each of 2"),
        (["a", "b"], [[]], "images has 1 entries for 2 prompts; give one for each, None where there is none"),
        ("a", 7, "images is int 7, expected a path, bytes of an image file, a PIL image or a numpy array"),
        ("a", [["a.png"]], r"images\[0\] is list \['a.png'\], expected a path"),
        (["a"], [[7]], r"images\[0\]\[0\] is int 7, expected a path"),
        ("a", [None], r"images\[0\] is NoneType None, expected a path"),
        ("a", np.zeros((2, 8, 8, 3), np.uint8), r"shape \(2, 8, 8, 3\) and type uint8, expected \(H, W, 3\) of uint8"),
        ("a", np.zeros((8, 8), np.uint8), r"images is an array of shape \(8, 8\)"),
        ("a", [np.zeros((3, 8, 8), np.uint8)], r"images\[0\] is an array of shape \(3, 8, 8\)"),
        ("a", np.zeros((8, 8, 3), np.float32), "type float32, expected"),
        ("a", np.zeros((0, 8, 3), np.uint8), r"shape \(0, 8, 3\)"),
        ("a", Image.new("I", (8, 8)), r"a PIL image \(I, 8 x 8\) cannot be used: has signed or 32-bit values"),
        ("a", Image.new("RGB", (0, 8)), r"a PIL image \(RGB, 0 x 8\) cannot be used"),
        ("a", "none.png", r"image 'none\.png' does not exist"),
    ],
)
def test_what_is_no_question_or_image_is_refused_by_name(loaded, prompts, images, message):
    with pytest.raises(UserError, match=message) as caught:
        mole_jax.generate(*loaded, prompts, images, decoding=SHORT)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": MeshConfig(tensor=0)}, "mesh.tensor is 0, it must be at least 1"),
        ({"mesh": MeshConfig(data=0)}, "mesh.data is 0, it must be -1 or over 0"),
        ({"dtype": "float16"}, "dtype is 'float16', did you mean 'bfloat16'?; it is one of float32, bfloat16"),
        ({"prompt": "v2"}, "prompt is 'v2', did you mean 'v1'?"),
        ({"image_aspect": "squash"}, "image_aspect is 'squash'"),
    ],
)
def test_settings_of_load_are_checked_before_anything_is_read(settings, message):
    with pytest.raises(UserError) as caught:
        mole_jax.load("none", **settings)
    assert str(caught.value).startswith(message)


def test_the_function_stays_when_the_command_is_imported():
    import_all = "import mole_jax.generate, importlib; from mole_jax.generate import main; import mole_jax.convert"
    check = (
        "from mole_jax import generate; from mole_jax.api import generate as ours; "
        "assert generate is ours is mole_jax.generate; assert callable(main); "
        "assert importlib.import_module('mole_jax.generate').main is main; assert mole_jax.convert.main"
    )
    for order in (f"{import_all}; {check}", f"import mole_jax; mole_jax.generate; {import_all}; {check}"):
        subprocess.run([sys.executable, "-W", "error", "-c", order], check=True, cwd=ROOT)


def test_settings_of_decoding_arrive(loaded):
    model, processor = loaded
    whole = mole_jax.generate(model, processor, ["Repeat: left lung"], decoding=SHORT)[0]
    stop = whole.split()[1]
    cut = DecodingConfig(max_new_tokens=6, stop=(stop,))
    assert mole_jax.generate(model, processor, ["Repeat: left lung"], decoding=cut) == [whole.split(stop)[0].strip()]
    with pytest.raises(UserError, match=r"decoding\.top_p is 1\.5, it must be over 0 and at most 1"):
        mole_jax.generate(model, processor, ["Repeat: left lung"], decoding=DecodingConfig(top_p=1.5))
    with pytest.raises(UserError, match="batch_size is 0, it must be at least 1"):
        mole_jax.generate(model, processor, "Repeat: left lung", batch_size=0)
    with pytest.raises(UserError, match="the answer may have 500, the model has room for 512 together; shorten"):
        mole_jax.generate(model, processor, ["Repeat: left lung"], decoding=DecodingConfig(max_new_tokens=500))


def test_load_places_the_weights_and_takes_its_settings():
    model, processor = mole_jax.load(
        BASE, mesh=MeshConfig(data=2, fsdp=2), dtype="bfloat16", prompt="llava_mole", image_aspect="crop"
    )
    kernel = model.decoder.layers.mlp.up_proj.kernel[...]
    assert len(kernel.sharding.device_set) == 4
    assert kernel.dtype == jnp.bfloat16
    assert (processor.prompt, processor.image_aspect) == ("llava_mole", "crop")


def test_processor_places_images_and_refuses_a_wrong_number(loaded, tmp_path):
    _, processor = loaded
    arch = processor.arch
    prompt = processor("What is shown?", [png((9, 9, 9))])
    assert (prompt.tokens == arch.image_token_id).sum() == arch.image_span
    assert prompt.images.shape == (1, 64, 64, 3)
    # Padded to a square with CLIP's mean colour (LLaVA-1.5), above and below a wide picture.
    np.testing.assert_array_equal(prompt.images[0, 0, 0], (122, 116, 104))
    with pytest.raises(UserError, match="has 2 <image>, 1 images were given"):
        processor("<image> and <image>?", [png((9, 9, 9))])
    (tmp_path / "grey.png").write_bytes(png((9, 9, 9)))
    named = processor("What is shown?", [str(tmp_path / "grey.png")])
    np.testing.assert_array_equal(named.images, prompt.images)
    with pytest.raises(UserError, match=r"image 'none\.png' does not exist"):
        processor("What is shown?", [str(tmp_path / "none.png")])
    with pytest.raises(UserError, match="leaves its folder"):
        processor("What is shown?", ["../grey.png"], root=tmp_path)


def test_a_conversation_is_a_prompt_too(loaded):
    """The image stands before the first turn, and every answer ends as it did in training."""
    _, processor = loaded
    turns = [Turn("user", "What is shown?"), Turn("assistant", "A box."), Turn("user", "What colour?")]
    prompt = processor(turns, [png((9, 9, 9))])
    alone = processor("What is shown?", [png((9, 9, 9))]).tokens
    np.testing.assert_array_equal(prompt.tokens[: len(alone)], alone)
    words = processor.tokenizer
    assert (prompt.tokens == words.eos_id).sum() == 1
    assert words.decode(prompt.tokens).replace(" ", "").endswith("ASSISTANT:Abox.USER:Whatcolour?ASSISTANT:")


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        mole_jax.lode  # noqa: B018

"""``python -m mole_jax.generate``: a question, a file of them, a chat, and the one line that a mistake gets."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import resource
import runpy
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from mole_jax import api
from mole_jax.config import DecodingConfig, MeshConfig
from mole_jax.data.conversation import Turn
from mole_jax.errors import UserError
from mole_jax.serving.assistant import Assistant
from mole_jax.serving.chat import HELP, chat
from mole_jax.serving.questions import answer_file
from tests.tiny import ROOT, TOKENIZER
from tests.weights.runs import trained_run

QUESTIONS = ["What is on the left?", "Repeat: left lung", "Repeat: right lung", "Which colour?", "How many?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A MoLE run's folder on the embedded base, as the trainer leaves it, and a picture beside it."""
    folder = tmp_path_factory.mktemp("run")
    trained_run(folder / "mole", ROOT / "assets" / "quickstart_base", spread=0.05)
    Image.new("RGB", (80, 50), (200, 10, 10)).save(folder / "red.png")
    return folder


@pytest.fixture(scope="module")
def assistant(run):
    model, processor = api.load(str(run / "mole"), tokenizer=TOKENIZER)
    return Assistant.of(model, processor, DecodingConfig(max_new_tokens=8), 2)


def write_questions(folder, texts, **more):
    lines = [json.dumps({"question_id": i, "text": text, **more}) for i, text in enumerate(texts)]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_answered_and_resumed_without_asking_twice(assistant, tmp_path):
    asked, answers = write_questions(tmp_path, QUESTIONS), tmp_path / "out" / "answers.jsonl"
    outcome = answer_file(assistant, asked, answers, model_id="m")
    assert (outcome.answered, outcome.before, outcome.skipped) == (5, 0, [])
    whole = read(answers)
    assert [(one["question_id"], one["prompt"]) for one in whole] == list(enumerate(QUESTIONS))
    assert [one["text"] for one in whole] == assistant.answers([assistant.prompt(text) for text in QUESTIONS])
    assert whole[0]["model_id"] == "m"
    assert whole[0]["metadata"]["decoding"]["max_new_tokens"] == 8

    # Killed within the fourth line: that one is asked again, the three before are kept as they are.
    lines = answers.read_text().splitlines(keepends=True)
    kept = [line.replace('"text": "', '"text": "kept ') for line in lines[:3]]
    # That was within a character, too.
    answers.write_bytes("".join(kept).encode() + lines[3][:20].encode() + "ä".encode()[:1])
    outcome = answer_file(assistant, asked, answers, model_id="m")
    assert (outcome.answered, outcome.before) == (2, 3)
    assert answers.read_text() == "".join(kept + lines[3:])

    with pytest.raises(UserError, match='line 1 was made with model_id "m", not "other"; choose another --output'):
        answer_file(assistant, asked, answers, model_id="other")


def test_a_byte_order_mark_and_numbers_with_fractions_are_read(assistant, tmp_path):
    asked, answers = tmp_path / "asked.jsonl", tmp_path / "answers.jsonl"
    asked.write_text('{"question_id": 1.5, "text": "Which colour?"}\r\n', encoding="utf-8-sig")
    assert answer_file(assistant, asked, answers, model_id="m").answered == 1
    assert answer_file(assistant, asked, answers, model_id="m").before == 1
    assert [one["question_id"] for one in read(answers)] == [1.5]


def test_draws_do_not_depend_on_where_a_run_was_stopped(assistant, tmp_path):
    settings = DecodingConfig(max_new_tokens=8, temperature=1.5)
    drawn = dataclasses.replace(assistant, sampler=dataclasses.replace(assistant.sampler, decoding=settings))
    asked, answers = write_questions(tmp_path, ["Which colour?"] * 5), tmp_path / "answers.jsonl"
    answer_file(drawn, asked, answers, model_id="m")
    whole = answers.read_text()
    assert len({one["text"] for one in read(answers)}) > 1
    answers.write_text("".join(whole.splitlines(keepends=True)[:3]))
    answer_file(drawn, asked, answers, model_id="m")
    assert answers.read_text() == whole


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_of_questions_is_told_once(assistant, tmp_path, indent):
    asked = tmp_path / "questions.json"
    asked.write_text("\ufeff\n" + json.dumps([{"question_id": n, "text": "a"} for n in range(9)], indent=indent))
    with pytest.raises(UserError, match=r"questions\.json: is a JSON list; write the questions in it one a line"):
        answer_file(assistant, asked, tmp_path / "answers.jsonl", model_id="m", on_bad="skip")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("3", "expected an object"),
        ('{"question_id": 9}', "field text is missing"),
        ('{"question_id": 9, "txt": "a"}', "field text is missing; rename 'txt' to text"),
        ('{"question_id": 9, "answer": "a"}', "field text is missing; add it"),
        ('{"question_id": 9, "text": "half \\ud83d"}', "field text: character 5 is the lone surrogate \\ud83d"),
        ('{"question_id": NaN, "text": "a"}', "field question_id: expected text or a number, got nan"),
        ("[" * 10**5, "nested deeper than can be read"),
        ("9" * 5000, "a whole number of over"),
        ('{"question_id": 9, "text": " "}', "field text: expected a question, got ' '"),
        ('{"question_id": 9, "text": "a", "image": 3}', "field image: expected a path or a list of paths, got 3"),
        ('{"question_id": 9, "text": "a", "image": "none.png"}', "image 'none.png' does not exist"),
        ('{"question_id": 9, "text": "a", "image": "../a.png"}', "leaves its folder"),
        ('{"question_id": 9, "text": "a", "image": "broken.png"}', "cannot be read as one of JPEG"),
        ('{"question_id": 9, "text": "<image> a"}', "has 1 <image>, 0 images were given"),
        ('{"question_id": 0, "text": "a"}', "question_id 0 stands on an earlier line too"),
        ('{"question_id": null, "text": "a"}', "field question_id: expected text or a number, got None"),
    ],
)
def test_a_bad_line_is_named_or_skipped_and_counted(assistant, tmp_path, line, message):
    asked, answers = write_questions(tmp_path, QUESTIONS[:1]), tmp_path / "answers.jsonl"
    asked.write_text(asked.read_text() + "\n" + line + "\n" + '{"id": "last", "question": "Repeat: left lung"}\n')
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="--on-bad skip") as caught:
        answer_file(assistant, asked, answers, model_id="m")
    assert str(caught.value).startswith(f"{asked}: line 3: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    outcome = answer_file(assistant, asked, answers, model_id="m", on_bad="skip")
    assert (outcome.answered, len(outcome.skipped)) == (2, 1)
    assert message in outcome.skipped[0]
    assert [one["question_id"] for one in read(answers)] == [0, "last"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("file/answers.jsonl", "cannot be written (File exists); a file has this name"),
        ("folder", "is no file; choose another --output"),
        ("/dev/full", "is no file; choose another --output"),  # read for answers, it would never end
        ("/proc/answers.jsonl", "cannot be written (No such file or directory)"),
        ("x" * 300, "cannot be written (File name too long); choose a shorter name"),
    ],
)
def test_an_output_that_cannot_be_written_is_one_line(assistant, tmp_path, name, message):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    asked = write_questions(tmp_path, QUESTIONS[:1])
    with pytest.raises(UserError) as caught:
        answer_file(assistant, asked, tmp_path / name, model_id="m")
    where = "file" if name.startswith("file/") else name  # the folder that it is not is at fault
    assert str(caught.value).startswith(f"{tmp_path / where}: {message}")


def test_a_full_disk_keeps_the_answers_so_far(assistant, tmp_path):
    """A limit on the size of files stands for the disk: the third answer does not fit whole."""
    asked, answers = write_questions(tmp_path, QUESTIONS), tmp_path / "answers.jsonl"
    answer_file(assistant, asked, answers, model_id="m")
    whole = answers.read_text()
    answers.unlink()
    limit = sum(map(len, whole.encode().splitlines(keepends=True)[:2])) + 20
    before, _ = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(UserError, match=r"answers\.jsonl: cannot be written \(File too large\)"):
            answer_file(assistant, asked, answers, model_id="m")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(answers.read_bytes()) == limit
    outcome = answer_file(assistant, asked, answers, model_id="m")
    assert (outcome.before, answers.read_text()) == (2, whole)


def test_two_processes_do_not_answer_into_one_file(assistant, tmp_path):
    asked, answers = write_questions(tmp_path, QUESTIONS[:1]), tmp_path / "answers.jsonl"
    with answers.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"answers\.jsonl: another process writes its answers there; wait for it"):
            answer_file(assistant, asked, answers, model_id="m")
    assert answer_file(assistant, asked, answers, model_id="m").answered == 1


def test_a_chat_keeps_the_image_and_what_was_said(assistant, run):
    red = str(run / "red.png")
    said: list[str] = []
    lines = ["What is shown?\n", "\n", "Which colour?\n", "/image none.png\n", "/new\n", "Which colour?\n", "/hm\n"]
    chat(assistant, [red], iter(lines), said.append)
    told = "".join(said)

    def answer(*turns):
        return assistant.answers([assistant.prompt(turns, [red])])[0]

    shown, again = Turn("user", "What is shown?"), Turn("user", "Which colour?")
    first = answer(shown)
    second = answer(shown, Turn("assistant", first), again)
    third = answer(again)
    assert [part.split("\n")[0] for part in told.split("ASSISTANT: ")[1:]] == [first, second, third]
    assert "error: image 'none.png' does not exist" in told
    assert told.count(HELP) == 2
    assert len(said) > 15  # it comes in pieces


def door(*arguments, given=""):
    return subprocess.run(
        [sys.executable, "-m", "mole_jax.generate", *map(str, arguments)],
        input=given,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )


def test_the_door_answers_a_question_as_the_library_does(assistant, run):
    common = ("--checkpoint", run / "mole", "--tokenizer", TOKENIZER, "--max-new-tokens", 8)
    ran = door(*common, "--question", "What is shown?", "--image", run / "red.png")
    expected = assistant.answers([assistant.prompt("What is shown?", [str(run / "red.png")])])
    assert (ran.returncode, ran.stderr, ran.stdout) == (0, "", expected[0] + "\n")


@pytest.mark.slow
def test_the_door_answers_a_file_and_chats_on_several_devices(assistant, run, tmp_path):
    common = ("--checkpoint", run / "mole", "--tokenizer", TOKENIZER, "--max-new-tokens", 8, "--mesh.fsdp", 2)
    asked, answers = write_questions(tmp_path, QUESTIONS[:2]), tmp_path / "answers.jsonl"
    asked.write_text(asked.read_text() + "{\n")
    ran = door(*common, "--questions", asked, "--output", answers, "--on-bad", "skip")
    assert (ran.returncode, ran.stdout) == (0, f"{answers}: 2 answered, 0 before, 1 skipped\n")
    assert ran.stderr.startswith(f"skipped: {asked}: line 3: not JSON")
    texts = assistant.answers([assistant.prompt(text) for text in QUESTIONS[:2]])
    assert [one["text"] for one in read(answers)] == texts
    ran = door(*common, "--chat", given=QUESTIONS[0] + "\n")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert f"ASSISTANT: {texts[0]}\n" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--question", " "), "--question is empty; write a question"),
        (("--question", "a", "--chat"), "argument --chat: not allowed with argument --question (try --help)"),
        ((), "one of the arguments --question --questions --chat is required (try --help)"),
        (("--questions", "a.jsonl"), "--questions FILE and --output FILE belong together; give both or neither"),
        (("--questions", "a", "--output", "b", "--image", "c"), "--image belongs to --question and --chat; a file"),
        (("--question", "a", "--temperature", "-1"), "decoding.temperature is -1.0, it must not be negative; 0 is"),
        (("--question", "a", "--batch-size", "0"), "--batch-size is 0, it must be at least 1"),
        (("--question", "a", "--mesh.tensor", "0"), "mesh.tensor is 0, it must be at least 1"),
        (("--question", "a", "--mesh.data", "-2"), "mesh.data is -2, it must be -1 or over 0"),
        (("--question", "a", "--seed", "-1"), "decoding.seed is -1, it must be in [0, 2**32)"),
        (("--question", "a", "--seed", str(2**70)), f"decoding.seed is {2**70}, it must be in [0, 2**32)"),
    ],
)
def test_wrong_flags_get_one_line(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", "--checkpoint", "none", *arguments])
    # The package's attribute of this name is the function, so the door is read as ``python -m`` reads it.
    main = runpy.run_module("mole_jax.generate")["main"]
    with pytest.raises(UserError) as caught:
        main()
    assert str(caught.value).startswith(message)


def test_captions_are_no_chat(assistant):
    plain = dataclasses.replace(assistant, processor=dataclasses.replace(assistant.processor, prompt="plain"))
    with pytest.raises(UserError, match="the prompt preset plain is for captions and has no turns"):
        chat(plain, [], iter([]), print)


def test_adapters_are_cast_once_and_the_router_never(assistant):
    half = dataclasses.replace(assistant.sampler, dtype=jnp.dtype("bfloat16")).weights(assistant.params, {})
    mlp = half["decoder"]["layers"]["mlp"]
    assert mlp["router"]["kernel"].dtype == jnp.float32
    adapters = jax.tree.leaves({name: mlp[name]["adapter"] for name in ("gate_proj", "up_proj", "down_proj")})
    assert {leaf.dtype for leaf in adapters} == {jnp.dtype("bfloat16")}


def test_help_tells_every_setting_of_decoding_and_mesh():
    told = door("--help").stdout
    for config, prefix in ((DecodingConfig, "--"), (MeshConfig, "--mesh.")):
        for field in dataclasses.fields(config):
            assert f"{prefix}{field.name.replace('_', '-')} " in told
    for text in ("(default: 256)", "0 takes the most probable token (greedy)", "at least 1", "Over 1 makes every text"):
        assert text in " ".join(told.replace("│", " ").split())

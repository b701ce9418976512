"""`python -m mole_jax.data` tells before the training what the training would refuse, and cannot be made to lie."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from mole_jax.config import DomainConfig
from tests.data.domains_on_disk import record, write


@pytest.fixture
def look(tmp_path, tokenizer):
    """Returns a function that runs the door on records, with more of the config."""
    tokenizer.save(tmp_path / "tokenizer")

    def run(records: list, *flags: str, preset: str = "tiny", more: str = "") -> subprocess.CompletedProcess[str]:
        domains = (DomainConfig("d", write(tmp_path, "d", records)),)
        file = tmp_path / "config.py"
        file.write_text(
            "from mole_jax.config import *\n\n\ndef get_config():\n"
            f"    data = DataConfig(domains={domains!r}, sequence_length=300)\n"
            f"    model = ModelConfig(preset={preset!r}, tokenizer={str(tmp_path / 'tokenizer')!r})\n"
            f"    return Config(model=model, data=data, train=TrainConfig(steps=1){more})\n"
        )
        command = [sys.executable, "-m", "mole_jax.data", "--config", str(file), *flags]
        return subprocess.run(command, capture_output=True, text=True, timeout=100)

    return run


@pytest.mark.parametrize(
    ("flags", "more", "message"),
    [
        (["--data.sequence_length", "100000"], "", "data.sequence_length 100000 is over the"),
        (["--data.sequence_length", "4"], "", "data.sequence_length 4 has no place for an image"),
        (["--data.shards", "7"], "", "data.shards 7 does not divide train.batch_rows 64"),
        ([], ", evaluation=EvaluationConfig(tasks=(TaskConfig('t', 'none.json'),))", "none.json: no such file"),
    ],
)
def test_what_training_would_refuse_is_refused(look, flags, more, message):
    done = look([record("a")], *flags, more=more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_tokenizer_larger_than_the_embedding_is_refused(look, tmp_path):
    import sentencepiece

    text = (tmp_path / "text.txt").absolute()
    text.write_text("\n".join(f"word{i} other{i * 7919 % 1000}" for i in range(4000)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "large"), vocab_size=1400, hard_vocab_limit=False, minloglevel=2
    )
    done = look([record("a")], "--model.tokenizer", str(tmp_path / "large.model"))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.match(r"error: config: model\.tokenizer has \d+ tokens, the model's embedding 512; use the", done.stderr)


def test_records_cannot_forge_lines_or_act_on_the_terminal(look):
    hostile = "x\nerror: forged \x1b[2J\u202e"
    good = record(hostile, question="What?\nno problems", answer=f"It is {hostile}")
    done = look([good, {"id": hostile}], "--preview", "1")
    assert done.returncode == 2
    for printed in (done.stdout, done.stderr):
        assert not {"\x1b", "\u202e"} & set(printed)
        assert not [line for line in printed.splitlines() if line.startswith(("error", "no problems"))]
    assert r"(id 'x\nerror: forged \x1b[2J\u202e')" in done.stdout


def test_the_layout_is_told_and_how_many_are_kept(look):
    chat = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A dog."}]
    records = [{"messages": chat, "q_lang": language} for language in ("en", "zh", "en")]
    more = ", evaluation=EvaluationConfig(tasks=(TaskConfig('t', data.domains[0].path),))"
    done = look(records, "--data.domains.0.where", "q_lang=en", more=more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:2] == [
        "d: layout messages (by its keys), 2 of 3 records kept by where",
        "task t: layout messages (by its keys)",
    ]


def test_too_much_left_out_ends_with_2(look):
    records = [record("a"), record("b", answer="x" * 2000)]
    lost = look(records)
    assert (lost.returncode, lost.stderr) == (2, "")
    done = look(records, "--data.most_skipped", "0.4")
    assert done.returncode == 2
    assert "d: 1 of 2 records are left out (50.0%): 1 too long" in done.stdout
    assert "over data.most_skipped 0.4" in done.stderr

"""The model card (README.md) of what a run becomes for transformers or PEFT: what the run's files say, and no more.

The same run gives the same card: it has no date, and no path of the machine that it was written on.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from etils import epath

from mole_jax.config import AdapterConfig
from mole_jax.errors import UserError
from mole_jax.families import family_of
from mole_jax.files import read_json
from mole_jax.forms import MAYBE_NUMBER, NUMBER
from mole_jax.terminal import escaped, shortened, warning
from mole_jax.weights.format import Export
from mole_jax.weights.sources import LayeredSource

FILE = "README.md"
ABSENT = "-"
_RUN = {"name": (str, None), "data": ({"domains": ([{"name": str, "path": str}], None)}, None)}
_DRAWN = {"domains": ({...: {"share_expected": MAYBE_NUMBER, "share_of_examples": MAYBE_NUMBER}}, None)}
_SCORES = {
    "step": int,
    "tasks": {
        ...: {
            "loss": MAYBE_NUMBER,
            "exact": MAYBE_NUMBER,
            "score": MAYBE_NUMBER,
            "interval": ([NUMBER], None),
            "metric": (str, None),
            "examples": (int, None),
        }
    },
}
"""Forms (`mole_jax.forms`) of what is read of config.json, data_report.json and eval/step_*.json."""
_LORA = ("rank", "alpha", "scale", "dropout", "targets", "vision_targets")
_MOLE = (
    *("experts", "router_gradient", "router_bias", "route_by", "router_input", "shared_router", "shared_rank"),
    *("balance_loss", "balance_weight", "domain_weight"),
)
"""Fields of `AdapterConfig` that a card names."""

Rows = Sequence[Sequence[str]]


def model_card(export: Export, library: str, *, expert: int | None = None) -> str | None:
    """Returns the card of an export, or None where its source is no run that has trained anything.

    Args:
        export: the weights.
        library: what loads the export: transformers or peft.
        expert: the one expert that was kept of each MLP, if the others were left out.

    A damaged file of the run is told on stderr, and the card goes without it.
    """
    source = export.source
    if not isinstance(source, LayeredSource) or source.step is None or not source.trained:
        return None
    from huggingface_hub import ModelCard, ModelCardData  # a second to import

    run = _Run(epath.Path(source.name), source.step)
    base, family = _hub_name(export.base_name), family_of(export.architecture)
    data = ModelCardData(
        base_model=base,
        library_name=library,
        pipeline_tag="image-text-to-text",
        tags=[
            "mole_jax",
            family.name,
            *({"lora": ["lora"], "mole": ["mixture-of-experts"]}.get(export.adapter.kind, [])),
        ],
    )
    parts = [
        f"# {plain(run.name)}",
        _summary(export, source, run),
        _data(run),
        _scores(run) if expert is None else "",
        _adapters(source.adapter, expert),
        _use(export, library, base),
        _limits(export, library, expert, scored=bool(run.tasks)),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)) + "\n"))


def plain(text: str) -> str:
    """Returns a name as Markdown shows it: no control characters, no markup."""
    return re.sub(r"([\\`*\[\]<>|#~])", r"\\\1", escaped(shortened(text)))


class _Run:
    """What a run's folder says; what is not there is empty."""

    def __init__(self, folder: epath.Path, step: int):
        config = _read(folder / "config.json", _RUN)
        self.name = config.get("name") or folder.name
        self.domains = (config.get("data") or {}).get("domains") or []
        self.drawn: Mapping[str, Any] = _read(folder / "data_report.json", _DRAWN).get("domains") or {}
        self.step = step
        files = (folder / "eval").glob("step_*.json") if (folder / "eval").is_dir() else ()
        found = {int(number[1]): file for file in files if (number := re.fullmatch(r"step_(\d+)\.json", file.name))}
        # An evaluation before the first step says nothing of what was trained.
        evaluated = max((at for at in found if at == step or 0 < at < step), default=None)
        self.evaluated = evaluated
        self.tasks = {} if evaluated is None else _read(found[evaluated], _SCORES).get("tasks", {})


def _read(file: epath.Path, form: Any) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return read_json(file, form, remedy=f"{FILE} goes without it")
    except UserError as error:
        print(warning(f"warning: {escaped(str(error))}", sys.stderr), file=sys.stderr)
        return {}


def _hub_name(base: str | None) -> str | None:
    return base if base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) else None


def _base_text(export: Export, source: LayeredSource) -> str:
    if export.base is None:
        return f"random weights of seed {source.seed}"
    name, content = export.base
    if _hub_name(name):
        return f"{name} (hash {content[:12]})"
    if PurePath(source.name) in PurePath(name).parents:  # the trainer keeps there what no file holds
        return f"random weights of seed {source.seed} (hash {content[:12]})"
    return f"{plain(PurePath(name).name)}, a folder (hash {content[:12]})"


def _summary(export: Export, source: LayeredSource, run: _Run) -> str:
    versions = {name: importlib.metadata.version(name) for name in ("mole-jax", "jax")}
    quantised = f", quantised as {source.quantised} while it was trained on" if source.quantised else ""
    lines = [
        ("base", _base_text(export, source) + quantised),
        ("trained", ", ".join(source.trained)),
        ("steps", f"{run.step:,}"),
        ("seed", str(source.seed)),
        ("prompt", plain(source.prompt) if source.prompt else ABSENT),
        ("images", plain(source.image_aspect) if source.image_aspect else "as the base prepares them"),
        ("versions", f"mole_jax {versions['mole-jax']}, jax {versions['jax']}"),
    ]
    return "\n".join(f"- {name}: {text}" for name, text in lines)


def _data(run: _Run) -> str:
    rows = []
    for domain in run.domains:
        drawn = run.drawn.get(domain["name"], {})
        name = domain["path"] if domain["path"].startswith("tfds:") else domain["name"]
        rows.append([name, _percent(drawn.get("share_expected")), _percent(drawn.get("share_of_examples"))])
    return _section("Training data", ["domain", "share asked for", "share of the examples drawn"], rows)


def _scores(run: _Run) -> str:
    rows = [
        [name, _number(one.get("loss")), _percent(one.get("exact")), *_score(one), str(one.get("examples", ABSENT))]
        for name, one in run.tasks.items()
    ]
    heads = ["task", "held-out loss", "exact answers", "score x 100 (95 % interval)", "metric", "examples"]
    return _section(f"Scores at step {run.evaluated}", heads, rows)


def _score(task: Mapping[str, Any]) -> tuple[str, str]:
    score, interval = task.get("score"), task.get("interval")
    if score is None:
        return ABSENT, ABSENT
    reach = f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval and len(interval) == 2 else ""
    return f"{100 * score:.1f}{reach}", task.get("metric") or ABSENT


def _adapters(adapter: AdapterConfig, expert: int | None) -> str:
    if adapter.kind == "none":
        return ""
    rows = [["adapter.kind", adapter.kind]]
    for name in (*_LORA, *(_MOLE if adapter.kind == "mole" else ())):
        value = getattr(adapter, name)
        rows.append([f"adapter.{name}", ", ".join(value) or "none" if isinstance(value, tuple) else f"{value}"])
    note = "" if expert is None else f"Of {adapter.experts} experts this has expert {expert} alone, as plain LoRA."
    return "\n\n".join(filter(None, [_section("Adapters and router", ["setting", "value"], rows), note]))


def _use(export: Export, library: str, base: str | None) -> str:
    if export.source.tokenizer is None:
        return ""  # without one no processor loads
    kind, peft = family_of(export.architecture).classes, library == "peft"
    of_base = f'{kind}.from_pretrained(BASE, dtype="auto")'
    ending = ', stop_strings=["\\n"], tokenizer=processor.tokenizer' if export.source.prompt == "plain" else ""
    lines = [
        *(["from peft import PeftModel"] if peft else ()),
        f"from transformers import AutoImageProcessor, AutoProcessor, {kind}",
        "",
        'FOLDER, IMAGE = ".", "picture.png"  # this folder, or its name on the hub; your picture',
        *(
            [f'BASE = "{base}"' if base else 'BASE = "base"  # a folder from which transformers loads it']
            if peft
            else ()
        ),
        'content = [{"type": "image", "url": IMAGE}, {"type": "text", "text": "What is shown?"}]',
        "processor = AutoProcessor.from_pretrained(FOLDER)",
        'processor.image_processor = AutoImageProcessor.from_pretrained(FOLDER, backend="pil")  # exact pixels',
        f"model = PeftModel.from_pretrained({of_base}, FOLDER)"
        if peft
        else f'model = {kind}.from_pretrained(FOLDER, dtype="auto")',
        "inputs = processor.apply_chat_template(",
        '    [{"role": "user", "content": content}],',
        "    add_generation_prompt=True,",
        "    tokenize=True,",
        "    return_dict=True,",
        '    return_tensors="pt",',
        ").to(model.device, model.dtype)",
        f'answer = model.generate(**inputs, max_new_tokens=32{ending})[0, inputs["input_ids"].shape[1] :]',
        "print(processor.decode(answer, skip_special_tokens=True))",
    ]
    return "\n".join(["## Use", "", "```python", *lines, "```"])


def _limits(export: Export, library: str, expert: int | None, *, scored: bool) -> str:
    source = export.source
    if expert is not None:
        first = "The run's scores are of the whole mixture and not given here: one expert alone answers otherwise."
    elif scored:
        first = "The scores above are the run's, before this conversion; nothing else has been measured."
    else:
        first = "The run has no scores."
    lines = [first, "Licence and limits of the base are this model's too."]
    if export.adapter.kind == "mole":
        lines.append(
            "In bfloat16 transformers computes the router in bfloat16: near a tie it may choose another expert."
        )
    if source.quantised is not None:
        has = "names" if library == "peft" else "has"
        lines.append(f"It was trained on a base in {source.quantised}, of which this {has} the unquantised weights.")
    if source.tokenizer is None:
        lines.append("There is no tokenizer here; take the base's.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)


def _section(title: str, heads: Sequence[str], rows: Rows) -> str:
    if not rows:
        return ""
    lines = [heads, ["---"] * len(heads), *([plain(cell) for cell in row] for row in rows)]
    return f"## {title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.3f}"

"""Templates that write the day: a run keeps the one on which it began, whatever day it goes on."""

import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zoneinfo import ZoneInfo

import nemo_run as run
import pytest
from launching import forked, in_time_zones
from nemo.collections.common.tokenizers import AutoTokenizer
from transformers import AutoTokenizer as HFTokenizer

from aligner.checkpoint import folders
from aligner.common.errors import ConfigError
from aligner.data import chat_template
from aligner.demo import toy
from aligner.generate.generation import generate_responses
from aligner.generate.megatron_engine import MegatronEngine

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]
DATED = (
    "{{ strftime_now('%d ') }}{% for m in messages %}{{ m.role[0] + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)


def test_a_run_goes_on_with_the_day_on_which_it_began(
    tiny: Tiny, execute: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = HFTokenizer.from_pretrained(toy.TOKENIZER)
    hf.chat_template = DATED
    hf.save_pretrained(tmp_path / "tokenizer")

    def recipe(steps: int, name: str = "run", **data: Any) -> Any:
        made = tiny(name)
        made.model.tokenizer = run.Config(AutoTokenizer, str(tmp_path / "tokenizer"))
        made.data.apply_chat_template = True
        made.trainer.max_steps = steps
        for field, value in data.items():
            setattr(made.data, field, value)
        return made

    def on(day: int) -> None:
        today = datetime.date(2026, 11, day)
        date = SimpleNamespace(today=lambda: today, fromisoformat=datetime.date.fromisoformat)
        monkeypatch.setattr(chat_template, "datetime", SimpleNamespace(date=date))

    on(11)
    folder = execute(recipe(2))
    on(12)
    shutil.rmtree(tmp_path / "runs/tokens")
    execute(recipe(4))
    newest = folders.latest_checkpoint(folder)
    assert newest and folders.metadata(newest)["settings"]["data.date"] == "2026-11-11"
    # A run that begins the next day has that day, and does not take the tokens of the first.
    other = folders.latest_checkpoint(execute(recipe(2, "other")))
    assert other and folders.metadata(other)["settings"]["data.date"] == "2026-11-12"
    with pytest.raises(ConfigError, match=r"data\.date: was '2026-11-11', is '2026-11-13'"):
        execute(recipe(6, date="2026-11-13"))
    with pytest.raises(ConfigError, match=r"data\.date: 'tomorrow' is no day"):
        execute(recipe(6, date="tomorrow"))

    # It answers prompts with its own day, too: what the engine is asked has the tokens of training.
    asked: list[str] = []
    encode = chat_template.ChatTemplate.apply

    def listening(self: Any, *args: Any, **kwargs: Any) -> str:
        asked.append(encode(self, *args, **kwargs))
        return asked[-1]

    monkeypatch.setattr(chat_template.ChatTemplate, "apply", listening)
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "1+1="}) + "\n")
    engine = MegatronEngine(str(folder), apply_chat_template=True)
    generate_responses(str(tmp_path / "prompts.jsonl"), str(tmp_path / "out.jsonl"), engine, 1, max_tokens=2)
    assert asked and all(text.startswith("11 ") for text in asked)


def test_all_ranks_have_the_day_of_rank_0(tiny: Tiny, tmp_path: Path) -> None:
    hf = HFTokenizer.from_pretrained(toy.TOKENIZER)
    hf.chat_template = DATED
    hf.save_pretrained(tmp_path / "tokenizer")
    recipe = tiny()
    recipe.trainer.devices = 2
    recipe.model.tokenizer = run.Config(AutoTokenizer, str(tmp_path / "tokenizer"))
    recipe.data.apply_chat_template = True
    codes, said = forked(tmp_path, [(2, run.Partial(in_time_zones, job=recipe))])
    assert codes == [[0, 0]], said[-4000:]
    newest = folders.latest_checkpoint(tmp_path / f"runs/{recipe.log.name}")
    day = datetime.datetime.now(ZoneInfo("Etc/GMT-14")).date()
    assert newest and folders.metadata(newest)["settings"]["data.date"] == day.isoformat()
    # Of training and validation; rank 1 has none of its own.
    assert len(list((tmp_path / "runs/tokens").glob("*/tokens.arrow"))) == 2

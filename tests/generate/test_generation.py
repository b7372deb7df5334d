"""Answers by Megatron: the same whatever the batch, the ranks and the kills; those of transformers where greedy."""

# ruff: noqa: E501
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch
from launching import TIME_LIMIT, forked

from aligner.common.errors import ConfigError, RowError
from aligner.generate import journal
from aligner.generate.engine import Choice, GenerationRequest
from aligner.generate.generation import generate_responses
from aligner.generate.journal import Journal
from aligner.generate.megatron_engine import MegatronEngine
from aligner.generate.requests import speed_of
from aligner.generate.sampling import Sampling

Tiny = Callable[..., Any]


def taught(recipe: Any) -> Path:
    """A model that has learned for a few steps what answers look like, so that some end and some do not."""
    import fiddle as fdl

    from aligner.recipes import methods

    methods.sft(recipe)
    recipe.optim.config.lr = 5e-3
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = 12
    return fdl.build(recipe)()


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, tiny_in: Callable[[Path], Tiny]) -> Path:
    recipe = tiny_in(tmp_path_factory.mktemp("policy"))("policy", held_out=0)
    recipe.model.config.seq_length = 1024  # room for long prompts
    return taught(recipe)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}{'+1' * (i % 5)}="}) + "\n" for i in range(12)))
    return str(path)


def told(path: Path) -> list[tuple[Any, ...]]:
    return [
        (row["key"], row["response"], row["num_tokens"], row["finish_reason"], row["seed"])
        for row in journal.read(path)
    ]


@pytest.fixture(scope="module")
def answered(policy: Path, prompts: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three answers to twelve prompts, eight at a time."""
    output = tmp_path_factory.mktemp("answered") / "answers.jsonl"
    return generate_responses(prompts, str(output), MegatronEngine(str(policy)), num_generations=3, max_tokens=10)


def test_every_prompt_is_answered_in_order(answered: Path, prompts: str) -> None:
    rows = list(journal.read(answered))
    assert [row["prompt"] for row in rows] == [
        json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines() for _ in range(3)
    ]
    assert [row["key"].rpartition("/")[2] for row in rows] == ["0", "1", "2"] * 12
    finishes = {row["finish_reason"] for row in rows}
    assert "stop" in finishes and finishes <= {"stop", "length", "special"}
    assert len({row["response"] for row in rows}) > 12
    assert not answered.with_name("answers.jsonl.parts").exists()
    assert speed_of(answered)["tokens"] > speed_of(answered)["answers"] > 0


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_changes_nothing(policy: Path, prompts: str, answered: Path, tmp_path: Path, batch_size: int) -> None:
    engine = MegatronEngine(str(policy), batch_size=batch_size)
    other = generate_responses(prompts, str(tmp_path / "a.jsonl"), engine, num_generations=3, max_tokens=10)
    assert told(other) == told(answered)


def test_neighbours_change_no_bit(policy: Path, tmp_path: Path) -> None:
    """The same batch size, another order: log-probabilities are equal, not close."""
    engine = MegatronEngine(str(policy), batch_size=4)
    questions = [
        GenerationRequest(key=str(i), prompt=f"{i}{'+1' * (i % 5)}=", seed=i, source="here:1") for i in range(14)
    ]
    with engine.session(tmp_path):
        one, other = (
            {a.key: a for a in engine.generate(asked, Sampling(max_tokens=12))}
            for asked in (questions, questions[::-1])
        )
    assert one == other


def test_long_neighbours_change_no_bit(policy: Path, tmp_path: Path) -> None:
    """Of all slots as many keys are attended to as the longest holds; torch's kernel takes 512 of them at a time."""
    engine = MegatronEngine(str(policy), batch_size=4)
    lengths = [2, 29, 250, 30, 3, 31, 257, 254, 4, 33, 255, 120]
    questions = [GenerationRequest(key=str(n), prompt="1+" * n + "=", seed=n, source="here:1") for n in lengths]
    with engine.session(tmp_path):
        one, other = (
            {a.key: a for a in engine.generate(asked, Sampling(max_tokens=14))}
            for asked in (questions, questions[::-1])
        )
        alone = {a.key: a for q in questions[:2] for a in engine.generate([q], Sampling(max_tokens=14))}
    assert one == other
    assert alone == {key: one[key] for key in alone}


def test_a_prompt_is_read_once_for_all_of_its_answers(
    policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers that took it from a neighbor, or from their own slot, are those of one that read it."""
    from aligner.generate import decoding

    read: list[int] = []
    passed = decoding._passed

    def counting(model: Any, cache: Any, tokens: Any, slots: Any, counts: list[int]) -> Any:
        read.extend(count for count in counts if count > 1)
        return passed(model, cache, tokens, slots, counts)

    monkeypatch.setattr(decoding, "_passed", counting)
    engine = MegatronEngine(str(policy), batch_size=2)
    questions = [
        GenerationRequest(key=f"{i}/{j}", prompt=f"{i}+1=", seed=7 * i + j, source=str(i))
        for i in range(2)
        for j in range(5)
    ]
    with engine.session(tmp_path):
        all_at_once = {a.key: a for a in engine.generate(questions, Sampling(max_tokens=12))}
        assert len(read) == 2
        alone = {a.key: a for q in questions for a in engine.generate([q], Sampling(max_tokens=12))}
    assert all_at_once == alone


def test_two_ranks_say_what_one_says(policy: Path, prompts: str, answered: Path, tmp_path: Path) -> None:
    def job(name: str, **settings: Any) -> Any:
        engine = run.Config(MegatronEngine, checkpoint=str(policy), devices=2, **settings)
        return run.Partial(
            generate_responses,
            prompts=prompts,
            output=str(tmp_path / name),
            engine=engine,
            num_generations=3,
            max_tokens=10,
        )

    codes, said = forked(tmp_path, [(2, job("data.jsonl")), (2, job("tensor.jsonl", tensor_model_parallel_size=2))])
    assert codes == [[0, 0], [0, 0]], said
    assert told(tmp_path / "data.jsonl") == told(answered)
    assert told(tmp_path / "tensor.jsonl") == told(answered)


def test_greedy_text_and_scores_are_those_of_transformers(tiny: Tiny, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from aligner.checkpoint.huggingface import export_hf

    recipe = tiny("unpadded", held_out=0)
    # An export leaves the vocabulary's padding behind, which takes a little of the probability.
    recipe.model.config.make_vocab_size_divisible_by = 1
    policy = taught(recipe)
    hf = AutoModelForCausalLM.from_pretrained(export_hf(str(policy), str(tmp_path / "hf"))).float().eval()
    engine = MegatronEngine(str(policy), batch_size=5)
    questions = [
        GenerationRequest(key=str(i), prompt=f"{i}{'+1' * (i % 5)}=", seed=i, source="here:1") for i in range(9)
    ]
    with engine.session(tmp_path):
        encode = engine._encode
        found = {a.key: a for a in engine.generate(questions, Sampling(temperature=0, max_tokens=12))}
        drawn = {a.key: a for a in engine.generate(questions, Sampling(temperature=0.7, top_k=5, max_tokens=12))}
        # Every second one is asked for a last line, unless it holds a 1.
        choice = Choice(before="=", options=("1", "12", "2", "3", "34"), lacking=lambda text: "1" not in text)
        chosen = [dataclasses.replace(q, choice=choice if i % 2 else None) for i, q in enumerate(questions)]
        ended = {a.key: a for a in engine.generate(chosen, Sampling(temperature=0, max_tokens=12))}
        ends, special = sorted(encode.stop_token_ids), sorted(encode.special)
    lines = 0
    for question in questions:
        ids = encode.encode_prompt("here:1", question.prompt)
        with torch.no_grad():
            made = hf.generate(
                torch.tensor([ids]), max_new_tokens=12, do_sample=False, eos_token_id=special, pad_token_id=special[0]
            )[0].tolist()[len(ids) :]
        answer = found[question.key]
        assert answer.num_tokens == len(made)
        text = encode.hf.decode([token for token in made if token not in special])
        assert answer.text == text and (answer.finish_reason == "stop") == (made[-1] in ends)
        with torch.no_grad():
            logps = hf(torch.tensor([ids + made])).logits[0].log_softmax(-1)
        expected = sum(float(logps[len(ids) - 1 + t, token]) for t, token in enumerate(made))
        assert answer.logp == pytest.approx(expected, abs=1e-4)
        last_line = ended[question.key]
        assert last_line.by_choice == (last_line.num_tokens > answer.num_tokens)
        if int(question.key) % 2 == 0 or "1" in answer.text or answer.finish_reason != "stop":
            assert last_line == answer
            continue
        ids, end = ids + made[:-1], min(ends)
        options = [(*encode.hf.encode(f"={option}", add_special_tokens=False), end) for option in choice.options]
        written: tuple[int, ...] = ()
        while written not in options:
            allowed = [option[len(written)] for option in options if option[: len(written)] == written]
            with torch.no_grad():
                logits = hf(torch.tensor([[*ids, *written]])).logits[0, -1]
            written += (max(allowed, key=lambda token: float(logits[token])),)
        assert last_line.text == answer.text + encode.hf.decode(written[:-1])
        assert last_line.num_tokens == answer.num_tokens - 1 + len(written)
        lines += 1
    assert lines > 0
    # Temperature and top-k change what is drawn, not what the policy thinks of it.
    assert any(drawn[key].text != found[key].text for key in found)


def test_an_answer_ends_before_a_stop_text(policy: Path, prompts: str, answered: Path, tmp_path: Path) -> None:
    stops = ["1", "so"]
    other = generate_responses(
        prompts, str(tmp_path / "a.jsonl"), MegatronEngine(str(policy)), num_generations=3, max_tokens=10, stop=stops
    )
    for row, before in zip(journal.read(other), journal.read(answered), strict=True):
        first = min((before["response"].find(text) for text in stops if text in before["response"]), default=None)
        assert row["response"] == before["response"][:first]
        assert row["finish_reason"] == ("stop" if first is not None else before["finish_reason"])


KILLED = """
import sys, time
from aligner.generate import requests
from aligner.generate.generation import generate_responses
from aligner.generate.megatron_engine import MegatronEngine
if __name__ == "__main__":
    append = requests.append
    def slow(file, row):
        append(file, row)
        time.sleep(0.05)
    requests.append = slow
    generate_responses(sys.argv[1], sys.argv[2], MegatronEngine(sys.argv[3]), num_generations=3, max_tokens=10)
"""


def test_a_killed_job_goes_on(policy: Path, prompts: str, answered: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    part = tmp_path / "answers.jsonl.parts/00000.jsonl"
    process = subprocess.Popen([sys.executable, "-c", KILLED, prompts, str(output), str(policy)])
    end = time.monotonic() + TIME_LIMIT
    while not part.exists() or part.read_bytes().count(b"\n") < 7:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = part.read_bytes().count(b"\n")
    assert 7 <= done < 36 and not output.exists()
    with part.open("ab") as file:
        file.write(b'{"key": "torn')
    generate_responses(prompts, str(output), MegatronEngine(str(policy)), num_generations=3, max_tokens=10)
    assert output.read_bytes() == answered.read_bytes()


def test_what_is_there_is_not_made_again(policy: Path, prompts: str, answered: Path, tmp_path: Path) -> None:
    before = answered.stat().st_mtime_ns
    generate_responses(prompts, str(answered), MegatronEngine(str(policy)), num_generations=3, max_tokens=10)
    assert answered.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match=r"temperature: is 0.5, but .*answers.jsonl was begun with 1.0; set it back"):
        generate_responses(
            prompts, str(answered), MegatronEngine(str(policy)), num_generations=3, max_tokens=10, temperature=0.5
        )


def refused(kind: type[Exception], message: str, policy: Path, output: Path, lines: list[Any], **settings: Any) -> None:
    path = output.with_name("refused.jsonl")
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    with pytest.raises(kind, match=message):
        generate_responses(str(path), str(output), MegatronEngine(str(policy)), **settings)
    assert not output.exists()


def test_prompts_that_cannot_be_asked_are_refused(policy: Path, tmp_path: Path, capfd: Any) -> None:
    output = tmp_path / "answers.jsonl"
    good = {"prompt": "1+1="}
    refused(RowError, r"refused.jsonl:2: 'prompt' is empty", policy, output, [good, {"prompt": " "}])
    refused(RowError, r"refused.jsonl:1: has no 'prompt'", policy, output, [{"question": "1+1="}])
    refused(RowError, r"refused.jsonl:2: is not JSON", policy, output, [good, "{"])
    refused(RowError, r"holds 0 different prompts", policy, output, [])
    refused(
        RowError,
        r":2: has the id 'a' of .*:1; ids must differ",
        policy,
        output,
        [{"id": "a", **good}, {"id": "a", "prompt": "2"}],
    )
    refused(
        RowError,
        r"1 of 2 prompts are too long: .*:2: 1040 tokens, and 1024 less max_tokens=8 leave 1016",
        policy,
        output,
        [good, {"prompt": "1" * 1040}],
        max_tokens=8,
    )
    refused(ConfigError, r"temperature: 0 gives 4 times the same answer", policy, output, [good], temperature=0)
    refused(ConfigError, r"num_generations: must be at least 1", policy, output, [good], num_generations=0)
    again = tmp_path / "again.jsonl"
    again.write_text("".join(json.dumps(row) + "\n" for row in (good, {"prompt": "2+2="}, good)))
    generate_responses(str(again), str(output), MegatronEngine(str(policy)), num_generations=1, max_tokens=4)
    assert len(list(journal.read(output))) == 2
    assert "1 stand in the file before, and are asked once: " in capfd.readouterr().err


def test_ranks_that_were_not_started_are_told(policy: Path, tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"2 x 1 = 2 ranks, but 1 were started"),
        MegatronEngine(str(policy), devices=2).session(tmp_path),
    ):
        pass


def test_a_journal_knows_what_it_was_made_of(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    first = Journal(path, {"a": 1})
    first.begin()
    with first.open_part(0) as file:
        journal.append(file, {"key": "x"})
    first.close()
    with pytest.raises(ConfigError, match=r"a: is 2, but .*rows.jsonl was begun with 1"):
        Journal(path, {"a": 2}).begin()
    again = Journal(path, {"a": 1})
    again.begin()
    assert again.rows({"x"}) == [{"key": "x"}] and not again.check_finished()
    # Another process would wait for nothing.
    code = f"from pathlib import Path; from aligner.generate.journal import Journal; Journal(Path({str(path)!r}), {{'a': 1}}).begin()"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: output: another job is at work on" in other.stderr
    again.finish(again.rows({"x"}))
    assert again.check_finished()
    with pytest.raises(ConfigError, match=r"a: is 2, but .*rows.jsonl was begun with 1"):
        assert Journal(path, {"a": 2}).check_finished()
    # What nobody says of it is somebody's own.
    (tmp_path / "rows.jsonl.settings.json").unlink()
    assert Journal(path, {"a": 2}).check_finished()

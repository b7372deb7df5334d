"""Pages of runs, from folders written here and from real runs."""

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest

from aligner.callbacks.metrics_csv import MetricsCSV
from aligner.common import run_folder
from aligner.common.errors import CheckpointError
from aligner.common.run_folder import read_metrics
from aligner.report import run_data, run_page
from aligner.report.samples import write_samples


def written(
    folder: Path, *, beta: float = 0.1, steps: int = 20, loss: Callable[[int], float] = lambda s: 1 / (s + 1)
) -> Path:
    """The folder of a run as one leaves it, with curves that are known."""
    (folder / "provenance/job-1").mkdir(parents=True)
    columns = MetricsCSV(folder / "metrics.csv").columns
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for step in range(steps):
            row = {"step": step, "train/loss": loss(step), "train/lr": 1e-5, "train/acc": 0.9}
            if step % 5 == 0:
                row |= {f"val/{name}": 0.5 for name in ("rewards_chosen_mean", "rewards_rejected_mean")}
                row |= {"val/acc": 0.9, "val/loss": loss(step), "val/logps_chosen_mean": -10.0, "val/chosen_lengths": 8}
            writer.writerow(row)
    (folder / "config.yaml").write_text(
        f"_target_: aligner.api.align\nloss:\n  beta: {beta}\ntrainer:\n  max_steps: 20\n"
    )
    job = {
        "began": "2026-01-01T00:00:00",
        "ranks": 1,
        "machine": {"host": "here"},
        "git": {"commit": "abc", "changed": True},
        "resumed_from": None,
        "initialized_from": None,
        "ended": {"at": "2026-01-01T01:00:00", "status": "success", "error": None},
    }
    (folder / "provenance/job-1/job.json").write_text(json.dumps(job))
    return folder


def test_a_page_needs_nothing_beside_it_and_holds_every_curve(tmp_path: Path) -> None:
    page = run_page.write_report([str(written(tmp_path / "one"))]).read_text()
    assert not re.search(r"(src|href)=[\"'](?!#)", page) and "http://www.w3.org" in page
    for title in ("loss", "accuracy", "learning rate"):
        assert f">{title}</text>" in page
    assert "gradient norm" not in page, "it was not measured"
    assert "loss.beta" in page and "abc, changed" in page and "nothing: no broken numbers" in page


def test_of_several_runs_it_shows_first_how_their_recipes_differ(tmp_path: Path) -> None:
    one, two = written(tmp_path / "one"), written(tmp_path / "two", beta=0.5)
    page = run_page.write_report([str(one), str(two)], str(tmp_path / "both.html")).read_text()
    (differs,) = re.findall(r'<tr class="differs">(.*?)</tr>', page)
    assert re.findall(r"<td[^>]*>(.*?)</td>", differs) == ["loss.beta", "0.1", "0.5"]
    assert page.index("loss.beta") < page.index("trainer.max_steps")


def test_what_should_not_be_overlooked(tmp_path: Path) -> None:
    folder = written(tmp_path / "one", loss=lambda step: abs(step - 5) / 10 + 0.1)
    run_folder.add_note(folder, 7, "the loss is 9, 8.0 standard deviations above <that>")
    (folder / "provenance/job-2").mkdir()
    first = json.loads((folder / "provenance/job-1/job.json").read_text())
    second = first | {"ended": {"at": "later", "status": "failed", "error": "SanityCheckError: no"}}
    (folder / "provenance/job-1/job.json").write_text(json.dumps(first | {"ended": None}))
    (folder / "provenance/job-2/job.json").write_text(json.dumps(second))
    said = run_data.diagnose(run_data.read(folder))
    assert [line.split(":")[0] for line in said] == [
        "step 7",
        "job 1 of 2 left no word of its end",
        "job 2 of 2 failed",
        "the validation loss was lowest at step 5 (0.1) and ended at 1.1",
    ]
    assert "&lt;that&gt;" in run_page.write_report([str(folder)]).read_text()


def test_long_curves_are_averaged_not_cut(tmp_path: Path) -> None:
    from aligner.report import run_page

    facts = run_data.read(written(tmp_path / "long", steps=1000))
    steps, values = run_page._thinned(*facts.curve("train/loss"))
    assert len(steps) == 334 and steps[-1] == 999
    assert sum(values[:-1]) * 3 + values[-1] == pytest.approx(sum(facts.curve("train/loss")[1]))


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no metrics.csv with a line; expected the folder of a run"):
        run_page.write_report([str(tmp_path)])


def test_a_run_is_drawn_at_its_end_and_stays_one_run_of_wandb(
    tiny: Callable[..., Any], execute: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs of a run: one page, one id; answers of its start and of its end, on the page and in W&B."""
    from lightning.pytorch.loggers import WandbLogger
    from nemo.lightning import RestoreConfig

    start = execute(tiny("start"))

    def job(steps: int) -> Any:
        recipe = tiny("run")
        recipe.resume.restore_config = run.Config(RestoreConfig, path=str(start.relative_to(tmp_path)))
        recipe.log.wandb = run.Config(WandbLogger, project="tests", offline=True)
        recipe.trainer.max_steps = steps
        recipe.optim.lr_scheduler.max_steps = 12
        return recipe

    monkeypatch.chdir(tmp_path)
    folder = execute(job(4))
    assert not (folder / "report.html").exists(), "four steps make no curve"
    execute(job(12))
    assert len(read_metrics(folder / "metrics.csv")) >= 12
    page = (folder / "report.html").read_text()
    assert ">job 2<" in page and "trainer.max_steps" in page
    name = (folder / "provenance/wandb_id").read_text().strip()
    assert len(list(folder.glob(f"wandb/offline-run-*-{name}"))) == 2
    files = b"".join(path.read_bytes() for path in folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert b"val/rewards_margin_mean" in files and b"global_batch_size" in files
    assert list(folder.glob("wandb/offline-run-*/files/media/html/report_*.html"))

    (tmp_path / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "20+2="}\n')
    monkeypatch.chdir(Path(__file__).parent)  # the start is relative to where the job was started
    write_samples(folder, str(tmp_path / "prompts.jsonl"), max_tokens=3)
    samples = run_data.read(folder).samples
    assert [row["prompt"] for row in samples] == ["1+1=", "20+2="] and {"before", "after"} <= samples[0].keys()
    assert "Answers before and after" in run_page.write_report([str(folder)]).read_text()
    (table,) = folder.glob("wandb/offline-run-*/files/media/table/samples_*.table.json")
    assert json.loads(table.read_text())["columns"] == ["prompt", "before", "after"]


def test_a_report_that_fails_costs_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written(tmp_path / "one")
    (folder / "config.yaml").write_text("{")
    assert run_page.write_final_report(folder) is None
    assert "no report of this run: ParserError" in capsys.readouterr().err


def curves(**values: list[float]) -> run_data.RunData:
    names = {name.replace("_", "/", 1): series for name, series in values.items()}
    count = max(map(len, names.values()))
    rows = [{"step": i} | {name: series[i] for name, series in names.items() if i < len(series)} for i in range(count)]
    return run_data.RunData(Path("run"), rows, {}, [], [], [])


@pytest.mark.parametrize(
    ("values", "told"),
    [
        # The demo's: the chosen ones lose little while the margin grows by 32 nats.
        ({"val_acc": [0.5, 0.9, 0.96], "val_logps_chosen_mean": [-3.2, -7.2, -5.3],
          "val_logps_rejected_mean": [-3.9, -30, -38.1]}, None),
        ({"val_acc": [0.5, 0.9, 0.96], "val_logps_chosen_mean": [-30, -35, -37],
          "val_logps_rejected_mean": [-30, -40, -50]}, r"fell from -30 to -37 nats \(7\), of the rejected"),
        ({"val_acc": [0.5, 0.9, 0.96], "val_logps_chosen_mean": [-30, -31, -32],
          "val_logps_rejected_mean": [-30, -32, -34]}, "fell from -30 to -32 nats"),
        ({"train_acc": [0.5] + [1.0] * 12, "val_acc": [0.5, 0.56]}, "1.00 on training rows and 0.56 on held-out"),
        ({"train_grad_norm": [1.0, 300, 350, 360], "val_acc": [0.5, 0.9]}, "gradient's norm is 355 in the second half"),
        ({"train_grad_norm": [1.0, 300, 2, 3], "train_acc": [0.5, 0.9, 0.9], "val_acc": [0.5, 0.8]}, None),
    ],
)  # fmt: skip
def test_what_curves_tell(values: dict[str, list[float]], told: str | None) -> None:
    said = run_data.diagnose(curves(**values))
    assert len(said) == (told is not None), said
    assert told is None or re.search(told, said[0])

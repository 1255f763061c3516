"""A finished run gets its report again, with the numbers that the run recorded."""

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import TrainedRun
from run_folders import make_run

from pipelines.report import main
from serve.contract.confidence import fit_threshold
from train.evaluation.predictions import read_predictions


def test_a_report_written_anew_has_the_runs_numbers(
    trained: TrainedRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (trained.folder / "report.html").read_text(encoding="utf-8")
    assert "data:image/jpeg;base64," in first
    run = Path(shutil.copytree(trained.folder, tmp_path / "small run"))
    assert main(["--run", str(run)]) == 0
    again = (run / "report.html").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: (row["val/accuracy"], -row["val/log_loss_calibrated"]))
    p = read_predictions(run)
    threshold = fit_threshold(p.probabilities.max(axis=1), p.correct).probability
    for page, location in ((first, "runs/small"), (again, f"'{run}'")):
        numbers = (
            "val/accuracy",
            "val/log_loss",
            "val/log_loss_calibrated",
            "val/ece",
            "val/ece_calibrated",
        )
        assert [name for name in numbers if f">{best[name]:.4f}<" not in page] == []
        shown = page.replace("&#39;", "'")
        assert f"python export/main.py --run {location}<" in shown
        assert f"python serve/main.py --model {location} --images" in shown
        curves = re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", page)[0]
        assert f"best epoch {best['epoch']}" in base64.b64decode(curves).decode()
        assert f" {100 * threshold:.2f} %, above" in page
    (run / "report.html").write_text("mine")
    assert main(["--run", str(run)]) == 2
    assert main(["--run", str(run), "--images", str(tmp_path), "--overwrite"]) == 0
    assert "data:image/jpeg" not in (run / "report.html").read_text(encoding="utf-8")
    assert "report.html" in capsys.readouterr().err


def test_a_run_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    assert main(["--run", str(make_run(tmp_path / "a"))]) == 2

"""What MLflow gets as the settings of a run: the values that were used."""

from pathlib import Path

import pytest
from train_data import CPU, ONE, make_data

from train.engine.build import build_run


@pytest.mark.parametrize("pixel_cache", ["on", "off"])
def test_parameters_hold_what_was_chosen_at_the_start(tmp_path: Path, pixel_cache: str) -> None:
    config, data = make_data(tmp_path, precision="auto", deterministic=True, pixel_cache=pixel_cache)
    run = build_run(config, data, None, ONE, CPU, 0, print)
    found = run.parameters()
    assert (found["precision"], found["channels_last"]) == ("fp32", True)
    assert (found["device"], found["num_workers"], found["compile"]) == ("cpu", 0, False)
    assert found["pixel_cache"] == pixel_cache
    assert (found["cache_size"] > 0) == (pixel_cache == "on")
    assert found["eval_size"] == config.preprocess().size > 0
    assert (found["dropout"], found["drop_path"]) != (None, None)
    unset = {name for name, value in found.items() if value is None or value == "auto"}
    assert unset <= {"data_format", "resize_mode", "interpolation", "lr", "weight_decay", "optimizer"}

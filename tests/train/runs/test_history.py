"""History: which epoch is the best, when the run is validated, and when it ends."""

from train.config import TrainConfig
from train.runs.history import History


def update_all(rows: list[tuple[float, float]], config: TrainConfig) -> tuple[History, list[bool]]:
    """Rows are (accuracy, log loss)."""
    history = History()
    metrics = [{"val/accuracy": accuracy, "val/log_loss_calibrated": loss} for accuracy, loss in rows]
    return history, [history.update(m, config) for m in metrics]


def test_best_is_by_accuracy_and_ties_by_log_loss() -> None:
    rows = [(0.5, 0.9), (0.7, 0.8), (0.7, 0.9), (0.7, 0.7), (0.7, 0.7), (0.6, 0.1)]
    history, improved = update_all(rows, TrainConfig())
    assert improved == [True, True, False, True, False, False]
    assert (history.best_epoch, history.epochs_done) == (4, 6)
    assert history.best == {"val/accuracy": 0.7, "val/log_loss_calibrated": 0.7}


def test_best_can_be_by_log_loss() -> None:
    rows = [(0.5, 0.9), (0.4, 0.8), (0.9, 0.8), (0.99, 0.85)]
    history, improved = update_all(rows, TrainConfig(best_by="log_loss"))
    assert improved == [True, True, True, False]
    assert history.best_epoch == 3


def test_a_log_loss_of_nan_is_never_an_improvement() -> None:
    _, improved = update_all([(0.5, 0.9), (0.5, float("nan"))], TrainConfig())
    assert improved == [True, False]


def test_a_log_loss_of_nan_is_soon_no_longer_the_best() -> None:
    rows = [(0.5, float("nan")), (0.6, 0.7), (0.6, 0.8)]
    history, improved = update_all(rows, TrainConfig(best_by="log_loss"))
    assert improved == [True, True, False]
    assert history.best_epoch == 2


def test_patience_ends_the_run() -> None:
    config = TrainConfig(epochs=10, patience=2)
    history, _ = update_all([(0.5, 1), (0.6, 1), (0.5, 1)], config)
    assert not history.complete(config)
    history.update({"val/accuracy": 0.6, "val/log_loss_calibrated": 2}, config)
    assert history.complete(config)
    assert not history.complete(config.replace(patience=0))


def test_re_tuning_that_patience_began_continues_to_its_end_and_is_validated_in_each_epoch() -> None:
    """Also when its first epoch is the best so far, which ends what patience waits for."""
    config = TrainConfig(epochs=20, patience=3, val_interval=3, retune_epochs=3)
    history, validated = History(), []
    while not history.complete(config):
        due = history.validates(config)
        accuracy = 0.9 if history.retuning(config) else 0.5
        history.update({"val/accuracy": accuracy, "val/log_loss_calibrated": 1.0} if due else {}, config)
        validated += [history.epochs_done] * due
    assert validated == [1, 2, 5, 6, 7]
    assert (history.best_epoch, history.retuned) == (5, 3)


def test_stop_after_stops_a_run_that_is_not_complete() -> None:
    config = TrainConfig(epochs=10, stop_after=2)
    history, _ = update_all([(0.5, 1)], config)
    assert not history.stopped(config)
    history.update({"val/accuracy": 0.6, "val/log_loss_calibrated": 2}, config)
    assert history.stopped(config)
    assert not history.complete(config)
    assert not history.stopped(config.replace(stop_after=0))


def test_the_first_the_last_and_every_second_epoch_before_it_are_validated() -> None:
    config, history = TrainConfig(epochs=6, val_interval=2, retune_epochs=2), History()
    validated = []
    while not history.complete(config):
        due = history.validates(config)
        metrics = {"val/accuracy": 0.5, "val/log_loss": 1.0, "val/log_loss_calibrated": 1.0}
        history.update(metrics if due else {}, config)
        if due:
            validated.append(history.epochs_done)
    assert validated == [1, 2, 4, 6, 7, 8]
    assert history.best_epoch == 1

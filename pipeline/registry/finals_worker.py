"""A worker process of finals: trains what it is sent, one recipe after the other; see finals_trainers.py."""

import os
import pickle
import sys
import traceback
from pathlib import Path

from pipeline.runtime import freeze_imports  # before MLflow and torch

# isort: split
from pipeline.data.prepare import prepare
from pipeline.errors import UserError
from pipeline.experiment import Interrupted
from pipeline.registry.finals_trainers import Trainer, Training, WorkerSetup
from pipeline.tracking.run_data import RunData, find_data
from pipeline.tracking.tracker import MlflowTracker
from pipeline.training.loop import EpochReport
from pipeline.worker_process import Channel

FLUSH_S = 3.0  # for MLflow to take all; what is not sent by then waits on disk, for the command
STOP_REASON = "its finals were stopped, or decided without it"


def main() -> None:
    """A worker process: a `WorkerSetup` comes, then a `Training` at a time.

    The answers are an `EpochReport` after each epoch and an `Outcome` at the end; a UserError, or a traceback, is the last.
    """
    channel = Channel()
    try:
        if message := channel.receive():
            _serve(pickle.loads(message), channel)
    except Interrupted:
        pass
    except UserError as error:
        channel.send(pickle.dumps(error))
    except BaseException:
        channel.send(pickle.dumps(traceback.format_exc()))
    sys.stderr.flush()
    os._exit(0)  # threads of libraries would keep the process alive


def _serve(setup: WorkerSetup, channel: Channel) -> None:
    device = setup.placement.set_up()
    places = [setup.data_place] if setup.data_place else []
    seen = RunData(f"study {setup.study.name}", setup.about, setup.data_digest, places, setup.home)
    located = find_data(seen, Path(places[0]).parent if places else Path(), download=False)
    data = prepare(located.images, setup.about, device)
    freeze_imports()
    tracker = MlflowTracker(setup.home, setup.tracking_uri, connect_now=False)
    trainer = Trainer(tracker, setup.study, data, device, channel.stop_requested, STOP_REASON)

    def report_epoch(report: EpochReport) -> None:
        channel.send(pickle.dumps(report))

    try:
        while message := channel.receive():
            training: Training = pickle.loads(message)
            outcome = trainer.train(training, report_epoch)
            channel.send(pickle.dumps(outcome))
    finally:
        tracker.flush(FLUSH_S)

"""A worker process of finals: trains what it is sent, one recipe after the other; see finals_trainers.py."""

import os
import pickle
import sys
import traceback
from pathlib import Path

from pipeline.runtime import freeze_imports  # before MLflow and torch

# isort: split
from pipeline.data import cache
from pipeline.data.datasets import Dataset
from pipeline.data.prepare import prepare
from pipeline.errors import UserError
from pipeline.experiment import Interrupted
from pipeline.registry.finals_trainers import CANCEL, Trainer, Training, WorkerSetup
from pipeline.tracking.run_data import RunData, find_data
from pipeline.tracking.tracker import MlflowTracker
from pipeline.worker_process import Channel

FLUSH_S = 3.0  # for MLflow to take all; what is not sent by then waits on disk, for the command
STOP_REASON = "its finals were stopped, or decided without it"


def main(channel: Channel) -> None:
    """A worker process: a `WorkerSetup` comes with the first `Training`, then one at a time.

    The answers are an `EpochReport` after each epoch and an `Outcome` at the end; a UserError, or a traceback, is the last.
    """
    try:
        if message := channel.receive():
            setup, training = pickle.loads(message)
            _serve(setup, training, channel)
    except Interrupted:
        pass
    except UserError as error:
        channel.send(pickle.dumps(error))
    except BaseException:
        channel.send(pickle.dumps(traceback.format_exc()))
    sys.stderr.flush()
    os._exit(0)  # threads of libraries would keep the process alive


def _serve(setup: WorkerSetup, training: Training, channel: Channel) -> None:
    def check_stop() -> None:
        if channel.stop_requested():
            raise Interrupted(STOP_REASON)

    device = setup.placement.set_up()
    with cache.reading(check_stop):
        data = prepare(find_dataset(setup), setup.about, device)
        freeze_imports()
        tracker = MlflowTracker(setup.home, setup.tracking_uri, connect_now=False)
        trainer = Trainer(tracker, setup.study, data, device, channel.stop_requested, STOP_REASON)
        message: bytes | None
        try:
            while True:
                outcome = trainer.train(training, lambda report: channel.send(pickle.dumps(report)))
                channel.send(pickle.dumps(outcome))
                while (message := channel.receive()) == CANCEL:
                    pass  # it stopped that training, or came when it had ended
                if message is None:
                    break
                training = pickle.loads(message)
        finally:
            tracker.flush(FLUSH_S)


def find_dataset(setup: WorkerSetup) -> Dataset:
    """The data set, where the command found it."""
    seen = RunData(f"study {setup.study.name}", setup.about, setup.data_digest, (), setup.home)
    if setup.in_files:
        return find_data(seen, Path(), setup.data_source, download=False).images
    return find_data(seen, Path(setup.data_source).parent, download=False).images

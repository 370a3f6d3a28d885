"""Training on Ray: Ray Train starts the ranks, joins them into a process group and restarts them all when one dies;
what a rank does is `training.train`, which goes on from its own last checkpoint.

Ray's checkpoints and dataset shards are not used: a shard restarts at row 0 after a failure, and a checkpoint is
registered some time after it was reported. Trade-off: progress travels through a small file in the run folder, which
needs no process of its own and can be read by anyone, at the price of being a second or two late.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.train
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from kddata import training
from kddata.cluster.resources import require_room, require_shared
from kddata.cluster.session import connected, original
from kddata.errors import KddataError
from kddata.store.storage import open_storage
from kddata.trackers import Trackers, require
from kddata.training.run import PROGRESS_FILE, Run

_WRITE_S = {"file": 0.5}  # at most so often; object stores bill each write
_WRITE_ELSEWHERE_S = 10.0
_POLL_S = 0.5


def train(
    job: training.TrainingJob,
    *,
    workers: int = 1,
    gpus_per_worker: float = 0,
    threads_per_worker: int = 1,
    loader_processes: int = 0,
    rank_timeout_s: float = 600,
    trackers: Sequence[str] = (),
    max_failures: int = 3,
    on_progress: Callable[[training.Progress], None] = lambda progress: None,
) -> training.TrainingResult:
    """The result of a run, trained by `workers` processes; a run that has finished is read back.

    Args:
        gpus_per_worker: with any, ranks talk by NCCL, else by gloo.
        threads_per_worker: of torch. With `loader_processes`, the CPUs that a worker reserves.
        rank_timeout_s: how long ranks wait for one that does not answer; then it counts as dead. It must be longer than
            an evaluation, in which they wait for rank 0.
        trackers: names of those that rank 0 tells how it goes; see `kddata.trackers`.
        max_failures: how often the ranks are restarted after one of them died. An error for users is not tried again.
        on_progress: called in this process, from another thread.

    This process holds the run's lock, for as long as the ranks train and are restarted.

    Raises ResourceError where the cluster has no room, ConfigError where nodes would not see one store or run, and
    what `training.train` raises.
    """
    require(trackers)
    training.check(job, world_size=workers)  # what is wrong with the job is found before anything starts
    result = training.finished(job)
    if result is not None:
        training.tidy_up(job.run)
        return result
    evaluated = None if job.evaluate is None else job.evaluate.images
    with training.driving_run(job.run), connected():
        stores = (job.store, *(member.url for member in job.others))
        require_shared({"store": stores, "run": job.run, "images": job.images, "evaluate.images": evaluated})
        cpus = threads_per_worker + loader_processes
        require_room("workers", workers, cpus=cpus, gpus=gpus_per_worker, key="cluster.workers")
        os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # the end of a run is seen that much sooner
        os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(rank_timeout_s)  # of a rank that waits for no other
        storage, _, name = job.run.rstrip("/").rpartition("/")
        trainer = TorchTrainer(
            _rank,
            train_loop_config={
                "job": job,
                "threads": threads_per_worker,
                "loader_processes": loader_processes,
                "trackers": tuple(trackers),
            },
            torch_config=TorchConfig(
                backend="nccl" if gpus_per_worker else "gloo", timeout_s=max(1, math.ceil(rank_timeout_s))
            ),
            scaling_config=ray.train.ScalingConfig(
                num_workers=workers,
                use_gpu=gpus_per_worker > 0,
                resources_per_worker={"CPU": cpus, **({"GPU": gpus_per_worker} if gpus_per_worker else {})},
            ),
            run_config=ray.train.RunConfig(
                name=name,
                storage_path=storage,
                failure_config=ray.train.FailureConfig(max_failures=max_failures),
                callbacks=[_GiveUp()],  # type: ignore[list-item]  # typed for the callbacks of V1
            ),
        )
        with _followed(job.run, on_progress), _interruptible():
            try:
                trainer.fit()
            except ray.train.TrainingFailedError as error:
                raise original(error) from None
        Run(job.run).tidy()
    result = training.finished(job)
    assert result is not None
    return result


def _rank(config: dict[str, Any]) -> None:
    """One rank, in its own process."""
    job, context = config["job"], ray.train.get_context()
    device = get_device()

    def wrap(network: nn.Module) -> nn.Module:
        if context.get_world_size() == 1:
            return network
        return DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)

    rank = context.get_world_rank()
    with Trackers(config["trackers"] if rank == 0 else (), job) as track:
        write = _reporter(job.run)

        def report(progress: training.Progress) -> None:
            if rank == 0:
                write(progress)
                track(progress)

        training.train(
            job,
            rank=rank,
            world_size=context.get_world_size(),
            device=str(device),
            threads=config["threads"],
            num_workers=config["loader_processes"],
            wrap=wrap,
            report=report,
            driven=True,
        )


def _reporter(run: str) -> Callable[[training.Progress], None]:
    """Writes progress into the run folder, now and then."""
    files, last_s = open_storage(run), float("-inf")
    pause_s = _WRITE_S.get(run.partition("://")[0] if "://" in run else "file", _WRITE_ELSEWHERE_S)

    def report(progress: training.Progress) -> None:
        nonlocal last_s
        if time.monotonic() - last_s >= pause_s or progress.step == progress.num_steps:
            last_s = time.monotonic()
            with files.replacing(PROGRESS_FILE) as file:
                file.write(json.dumps(dataclasses.asdict(progress)).encode())

    return report


class _GiveUp(ray.train.UserCallback):
    """Ends a run at an error for users: the next attempt would only meet it again."""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, KddataError):
                raise error


@contextlib.contextmanager
def _followed(run: str, on_progress: Callable[[training.Progress], None]) -> Iterator[None]:
    """A block within which a thread reads the progress file and passes on what is new."""
    files, over, last = open_storage(run), threading.Event(), b""

    def look() -> None:
        nonlocal last
        with contextlib.suppress(FileNotFoundError):
            data = files.read(PROGRESS_FILE)
            if data != last:
                last = data
                on_progress(training.Progress(**json.loads(data)))

    def follow() -> None:
        while not over.wait(_POLL_S):
            look()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
        over.set()
        thread.join()
        look()
        files.remove(PROGRESS_FILE)
    finally:
        over.set()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Makes ctrl-C a KeyboardInterrupt again: Ray Train ends the run, and then would end the process with code 0."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, before)

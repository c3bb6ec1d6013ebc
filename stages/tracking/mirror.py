"""Everything that talks to MLflow. A mirror: it is only written to, and nothing depends on it.

Journals (see `outbox`) are sent to MLflow whole and can be sent again at any time: the run is found
by its journal's name, and MLflow keeps one copy of equal metrics, tags, parameters and artifacts.
MLflow takes seconds to import, so only the recorder, the server's starter and tests import this module.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from stages.tracking import location, outbox, process

os.environ.update(
    MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="1", MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT="true"
)
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repo import ArtifactRepository
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.store.artifact.mlflow_artifacts_repo import MlflowArtifactsRepository

logger = logging.getLogger("stages.tracking")

METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100
KEY_LENGTH, PARAM_LENGTH, TAG_LENGTH = 250, 6000, 5000


def batches(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most `size` items."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def cut(text: str, limit: int) -> str:
    """`text`, shortened with an ellipsis where MLflow would refuse it."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _create_database(path: Path | None) -> None:
    """Make the database whole or not at all: one whose migrations a kill cut short never opens again."""
    if path is None or path.exists():
        return
    draft = path.with_name(f"{path.name}.draft")
    for rest in path.parent.glob(f"{draft.name}*"):
        rest.unlink()
    MlflowClient(f"sqlite:///{draft}").search_experiments(max_results=1)
    draft.rename(path)


class Mirror:
    """A client, and the experiment's id.

    Creates database and experiment once, under a file lock: two processes on a fresh database crash,
    and the loser of two creations lands in Default.
    """

    def __init__(self) -> None:
        process.LOCKS.mkdir(parents=True, exist_ok=True)
        with FileLock(process.LOCKS / "mlflow.lock", timeout=120):
            _create_database(location.database())
            self.client = MlflowClient(location.tracking_uri())
            self.experiment_id = self._experiment()
        location.remember_experiment(self.experiment_id)

    def _experiment(self) -> str:
        found = self.client.get_experiment_by_name(location.EXPERIMENT)
        if found is None:
            try:
                return self.client.create_experiment(location.EXPERIMENT, location.artifact_location())
            except MlflowException:  # a server shared with another machine: somebody was faster
                found = self.client.get_experiment_by_name(location.EXPERIMENT)
                if found is None:
                    raise
        if found.lifecycle_stage != "active":
            cure = f"`mlflow experiments restore -x {found.experiment_id}`"
            raise RuntimeError(f"experiment {location.EXPERIMENT!r} is deleted: bring it back with {cure}")
        return found.experiment_id

    def _search(self, condition: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment_id], condition, max_results=1000))

    def open(self, journal: outbox.Journal) -> str:
        """Id of the journal's run; created with its tags and parameters if it is not there yet.

        Runs that a kill left RUNNING in the same cell of this checkout become KILLED: the cell's
        lock is held, so nobody works on them.
        """
        start = journal.start()
        known = self._search(f"tags.journal = '{journal.name}'")
        if known:
            return known[0].info.run_id
        same_cell = f"tags.cell = '{start['tags']['cell']}' AND tags.checkout = '{start['tags']['checkout']}'"
        for run in self._search(f"attributes.status = 'RUNNING' AND {same_cell}"):
            self.client.set_terminated(run.info.run_id, "KILLED")
        tags = {key: cut(value, TAG_LENGTH) for key, value in start["tags"].items()}
        run = self.client.create_run(
            self.experiment_id, start["time"], tags | {"journal": journal.name}, start["name"]
        )
        return run.info.run_id

    def push_params(self, journal: outbox.Journal, run_id: str) -> None:
        """The parameters; values MLflow would refuse as too long are cut, and whole in params.json."""
        params = journal.start()["params"]
        rows = [Param(cut(key, KEY_LENGTH), cut(value, PARAM_LENGTH)) for key, value in params.items()]
        for batch in batches(rows, PARAMS_PER_CALL):
            self.client.log_batch(run_id, params=batch)
        if any(len(value) > PARAM_LENGTH for value in params.values()):
            with TemporaryDirectory() as folder:
                (path := Path(folder) / "params.json").write_text(json.dumps(params, indent=1))
                self._store(run_id).log_artifact(str(path))

    def _store(self, run_id: str) -> ArtifactRepository:
        """Where the files of a run go.

        An experiment that a clone made for itself names a folder of its own machine. Whoever comes to that
        clone's server from another one sends the files through the server, which keeps them in that folder.
        """
        uri, tracking = self.client.get_run(run_id).info.artifact_uri or "", location.tracking_uri()
        kept = f"/{location.artifact_folder().name}/"
        if location.is_server(tracking) and uri.startswith("file:") and kept in uri:
            return MlflowArtifactsRepository(f"mlflow-artifacts:/{uri.rpartition(kept)[2]}", tracking)
        return get_artifact_repository(uri, tracking_uri=tracking)

    def push_events(self, journal: outbox.Journal, run_id: str, file: str, skip: int = 0) -> int:
        """Metrics, tags and data sets after the first `skip` lines; returns the lines read in total."""
        events = list(journal.events(file, skip))
        rows = [row for event in events if event["kind"] == "metrics" for row in event["rows"]]
        for batch in batches((Metric(*row) for row in rows), METRICS_PER_CALL):
            self.client.log_batch(run_id, metrics=batch)
        tags = [RunTag(e["key"], cut(e["value"], TAG_LENGTH)) for e in events if e["kind"] == "tag"]
        for batch in batches(tags, PARAMS_PER_CALL):
            self.client.log_batch(run_id, tags=batch)
        data = [_dataset(event) for event in events if event["kind"] == "dataset"]
        if data:
            self.client.log_inputs(run_id, datasets=data)
        return skip + len(events)

    def push_artifacts(self, journal: outbox.Journal, run_id: str) -> None:
        """Files and folders. One that is gone (a killed stage's) is named in the tag `lost_artifacts`."""
        store, lost = self._store(run_id), []
        for event in journal.events():
            if event["kind"] != "artifact":
                continue
            source = journal.artifact_source(event)
            if source is None:
                lost.append(event["path"])
            elif source.is_dir():
                inside = "/".join(filter(None, [event["folder"], Path(event["path"]).name]))
                store.log_artifacts(str(source), inside)
            else:
                store.log_artifact(str(source), event["folder"])
        if lost:
            self.client.set_tag(run_id, "lost_artifacts", cut(", ".join(lost), TAG_LENGTH))

    def deliver(self, journal: outbox.Journal) -> None:
        """Send all of a journal whose stage is over, then remove it. No end means killed."""
        run_id = self.open(journal)
        self.push_params(journal, run_id)
        self.push_events(journal, run_id, "events.jsonl")
        self.push_events(journal, run_id, "system.jsonl")
        self.push_artifacts(journal, run_id)
        end = journal.end() or {"status": "KILLED", "time": None}
        self.client.set_terminated(run_id, end["status"], end["time"])
        journal.remove()


def _dataset(event: dict[str, Any]) -> DatasetInput:
    """A data set by name and hash. MLflow's digest holds 36 characters; the whole hash is the profile's."""
    profile = {"num_rows": event["rows"], "sha256": event["sha256"]}
    dataset = Dataset(
        name=event["name"],
        digest=event["sha256"][:36],
        source_type="sha256",
        source=json.dumps({"sha256": event["sha256"]}),
        profile=json.dumps(profile),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", event["context"])])


def flush_outbox(mirror: Mirror) -> int:
    """Deliver what former runs left behind; returns how many runs. One bad journal stops no other."""
    delivered = 0
    for journal in outbox.waiting():
        lock = FileLock(process.LOCKS / f"upload-{journal.name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue  # its own recorder is at work
        try:
            if journal.folder.exists():
                mirror.deliver(journal)
                delivered += 1
        except Exception:
            logger.exception("%s stays in the outbox", journal.name)
        finally:
            lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)
    return delivered

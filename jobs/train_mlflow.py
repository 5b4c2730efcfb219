"""MLflow as a tracker. Credentials are its client's business (MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from jobs.train_config import MlflowConfig
from jobs.train_tensorboard import scalars
from jobs.train_trackers import Line, RunFacts, newer

RUN_TAG = "dvae.run"  # by which a resumed run finds its own
MAX_METRICS, MAX_PARAMS, MAX_PARAM_CHARS = 1000, 100, 500  # of one request, and of a value


class MlflowTracker:
    """One run there for one output here; a resumed run goes on in it."""

    def __init__(self, config: MlflowConfig, facts: RunFacts) -> None:
        self._client = MlflowClient(tracking_uri=config.tracking_uri)
        experiment_id = self._experiment(config.experiment, facts.folder)
        wanted = f"tags.`{RUN_TAG}` = '{facts.run_id}'"
        found = self._client.search_runs([experiment_id], filter_string=wanted, max_results=1)
        if found:
            self._run_id, self._sent = found[0].info.run_id, _last_step(self._client, found[0])
            self._client.update_run(self._run_id, status="RUNNING")
            return
        run = self._client.create_run(experiment_id, tags={RUN_TAG: facts.run_id}, run_name=facts.name)
        self._run_id, self._sent = run.info.run_id, -1
        for params in _chunks(_params(facts.settings), MAX_PARAMS):
            self._client.log_batch(self._run_id, params=params)

    def send(self, lines: Sequence[Line], pictures: Mapping[str, bytes]) -> None:
        new = newer(lines, self._sent)
        metrics = (
            Metric(name, value, round(line["unix_s"] * 1000), line["step"])
            for line in new
            for name, value in scalars(line)
        )
        for chunk in _chunks(metrics, MAX_METRICS):
            self._client.log_batch(self._run_id, metrics=chunk)
        if new:
            self._sent = new[-1]["step"]
            self._send_pictures(self._sent, pictures)

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")

    def _send_pictures(self, step: int, pictures: Mapping[str, bytes]) -> None:
        for name, png in pictures.items():
            with tempfile.TemporaryDirectory(prefix="dvae-mlflow-") as folder:
                path = Path(folder, f"step-{step:08d}.png")
                path.write_bytes(png)
                self._client.log_artifact(self._run_id, str(path), name)

    def _experiment(self, name: str, folder: str) -> str:
        """A store that is a file puts pictures into the working directory, unless it is told otherwise; on a worker
        that is a folder of Ray's."""
        found = self._client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        has_server = str(self._client.tracking_uri).startswith(("http:", "https:", "databricks"))
        beside = None if has_server else Path(folder, "mlartifacts").absolute().as_uri()
        return str(self._client.create_experiment(name, artifact_location=beside))


def _last_step(client: MlflowClient, run: Any) -> int:
    """The highest step that the run has of any figure; -1 for none."""
    names = run.data.metrics  # each with its newest value
    histories = (client.get_metric_history(run.info.run_id, name) for name in names)
    return max((metric.step for history in histories for metric in history), default=-1)


def _params(settings: Mapping[str, Any], prefix: str = "") -> Iterator[Param]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _params(value, f"{prefix}{name}.")
        else:
            yield Param(prefix + name, str(value)[:MAX_PARAM_CHARS])


def _chunks(things: Iterable[Any], size: int) -> Iterator[list[Any]]:
    rest = iter(things)
    while chunk := list(islice(rest, size)):
        yield chunk

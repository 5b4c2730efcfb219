"""What can be wrong with the world, as a tree. Bad images are values (records.SampleFailure), not exceptions."""

from __future__ import annotations

from pipeline.urls import public_text, public_url


class PipelineError(Exception):
    """Something outside is wrong; the message names the thing and the remedy. `exit_code` is the command's."""

    exit_code = 2


class BadUrl(PipelineError):
    """A URL would be taken as the name of a local file that nobody means."""


class StorageError(PipelineError):
    """A URL cannot be read or written."""


class Damaged(StorageError):
    """An object was read, and is not what this project wrote there."""


class PublishFailed(StorageError):
    """The output cannot be written: no fault of the shard whose part it was."""


class NoShardsMatched(PipelineError):
    """A shard pattern matched no object."""


class NoRun(PipelineError):
    """The prefix holds no tokenising run."""


class RunMismatch(PipelineError):
    """The output prefix holds a run of another model, image spec, schema or options."""


class RunHeld(PipelineError):
    """Another live driver holds the output prefix."""

    exit_code = 3


class ShardError(PipelineError):
    """One shard cannot be read to its end; `reason` is stored with the quarantined shard. Holds no credentials."""

    reason = "unreadable"

    def __init__(self, url: str, detail: str) -> None:
        self.url, self.detail = public_url(url), public_text(detail)
        super().__init__(self.url, self.detail)  # both, so that the exception survives pickling between processes

    def __str__(self) -> str:
        return f"{self.url}: {self.detail}"


class ShardUnreadable(ShardError):
    """The store failed while the shard was read."""

    reason = "unreadable"


class ShardTruncated(ShardError):
    """The tar ends before its end-of-archive block, or the object is shorter than listed."""

    reason = "truncated"


class ShardDamaged(ShardError):
    """A tar header or member is not what the format allows."""

    reason = "damaged"


class ShardChanged(ShardError):
    """The object is not the one that was listed. Running again lists it anew."""

    reason = "changed"


class ShardCrashed(ShardError):
    """Whoever decoded the shard died of it, or fell silent, while the model's own process lives."""

    reason = "crashed"

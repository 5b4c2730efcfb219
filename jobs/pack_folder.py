"""`dvae pack` at the command line: the progress and the summary around pipeline.pack."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape

from jobs.progress import JobProgress
from pipeline.pack import PackSummary, pack

MAX_LEFT_OUT_SHOWN = 10


def run_pack(folder: str, out: str, *, shard_bytes: int, shard_samples: int, prefix: str) -> int:
    """Exit code 0, or raises PipelineError."""
    progress: JobProgress | None = None
    seen = 0

    def advance(done: int, total: int) -> None:
        nonlocal progress, seen
        if progress is None:
            progress = JobProgress("images", total)
            progress.__enter__()
        progress.advance(done - seen, f"{done:,} images packed")
        seen = done

    try:
        summary = pack(
            folder, out, shard_bytes=shard_bytes, shard_samples=shard_samples, prefix=prefix, progress=advance
        )
    finally:
        if progress is not None:
            progress.__exit__(None, None, None)
    _print(summary, Console(soft_wrap=True, highlight=False))
    return 0


def _print(summary: PackSummary, console: Console) -> None:
    reused = f" ({summary.num_reused} were there already)" if summary.num_reused else ""
    console.print(
        f"{summary.num_images:,} images, {summary.num_captions:,} captions and {summary.num_metadata:,} metadata files "
        f"in {len(summary.shard_urls):,} shards{reused}, {summary.packed_bytes / 1e6:,.1f} MB"
    )
    for url in (summary.shard_urls[0], summary.shard_urls[-1])[: len(summary.shard_urls)]:
        console.print(f"  {escape(url)}")
    if summary.left_out:
        console.print(f"[yellow]{len(summary.left_out):,} files are in no shard[/]:")
    for left_out in summary.left_out[:MAX_LEFT_OUT_SHOWN]:
        console.print(f"  {escape(str(left_out))}")

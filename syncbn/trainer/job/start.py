"""Ranks of this machine: started for a config, started again when one dies, and the one to blame named."""

import signal
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from syncbn.trainer import environment
from syncbn.trainer.config import Config, to_yaml
from syncbn.trainer.errors import FINAL, STOP_SIGNALS, USER_ERROR, Ended, RanksFailed
from syncbn.trainer.files import scratch
from syncbn.trainer.job.ranks import CAN_FORK, Ends, run_ranks
from syncbn.trainer.rank.life import EXIT_CODE, REASON
from syncbn.trainer.runs import status_file
from syncbn.trainer.runs.folder import RunFolder
from syncbn.trainer.runs.lock import now


def start_ranks(config: Config) -> None:
    """Run the config on ranks of this machine, and on new ones when one of them died, as often as it says.

    Not after what another try would not change, nor after a preemption. Raises RanksFailed.
    """
    environment.refuse_without_loopback()
    nproc = environment.ranks_to_start(config.launch)
    environment.set_rank_environment(config.launch, nproc)
    forked = CAN_FORK and environment.choose_device(config.launch).type == "cpu"
    for restart in range(config.launch.max_restarts + 1):
        with scratch() as folder:
            began, handed_over = now(), folder / "config.yaml"
            handed_over.write_text(to_yaml(config))
            ends = run_ranks(str(handed_over), nproc, signals_to_pass_on(), forked=forked)
            failure = failure_of(ends, handed_over)
        if failure is None:
            return
        if not isinstance(failure, Ended):
            cause = failure.reason or str(failure)
            sure = bool(failure.reason)
            status_file.blame(RunFolder(config.run).status, failure.rank, cause, sure=sure, since=began)
        if isinstance(failure, Ended) or failure.exit_code in FINAL or restart == config.launch.max_restarts:
            raise failure
        number = f"restart {restart + 1} of {config.launch.max_restarts}"
        print(f"{failure}: all ranks start again from the last checkpoint ({number})", file=sys.stderr, flush=True)
        if config.checkpoint.resume == "none":  # anew, but once
            config = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))


def failure_of(ends: Ends, handed_over: Path) -> RanksFailed | None:
    """What to raise for the ends of the ranks that a config was handed over to; None: they came to the run's end."""
    ranks = range(len(ends.exit_codes))
    if ends.signalled is not None:
        file = handed_over.with_name(EXIT_CODE)
        code = int(file.read_text()) if file.exists() else 128 + ends.signalled
        # With 0 they had come to the end of the run already
        return Ended(f"ended by {ends.signalled.name}", code, said(handed_over, *ranks)) if code else None
    failed = {rank: code for rank, code in ends.exit_codes.items() if code}
    if not failed:
        return None
    explained = [rank for rank in failed if said(handed_over, rank)]
    rank, code = to_blame(failed, explained, ends.stopped)
    reason = said(handed_over, *(ranks if code == USER_ERROR else [rank]))
    end = "failed" if rank in explained else end_in_words(code, ends.out_of_memory and rank not in ends.stopped)
    return RanksFailed(f"rank {rank} {end}", code, reason, rank)


def said(handed_over: Path, *ranks: int) -> str:
    """Why the ranks ended, by their own words, each told once."""
    files = [handed_over.with_name(f"{REASON}{rank}") for rank in ranks]
    return "; ".join(dict.fromkeys(file.read_text() for file in files if file.exists()))


def signals_to_pass_on() -> list[signal.Signals]:
    """The signals that the ranks are to have from this process, but for those that whoever runs it answers or ignores.

    submitit answers some to queue a job again (and Slurm sends them to the job's ranks, too); nohup ignores SIGHUP.
    """
    own = (signal.SIG_DFL, signal.default_int_handler)
    return [number for number in (*STOP_SIGNALS, signal.SIGHUP, signal.SIGQUIT) if signal.getsignal(number) in own]


def to_blame(
    exit_codes: dict[int, int], explained: Collection[int] = (), stopped: Collection[int] = ()
) -> tuple[int, int]:
    """The rank that the others fell with, and its exit code.

    One whose exit code says why, else one that was killed, else one that said why; and, of none, one that had ended
    before this process stopped the others. explained, stopped: ranks.
    """

    def likely(rank: int) -> tuple[bool, ...]:
        code = exit_codes[rank]
        killed = code < 0 and code != -signal.SIGTERM and rank not in stopped
        return code in FINAL, killed, rank in explained, rank not in stopped

    rank = max(exit_codes, key=likely)
    return rank, exit_codes[rank]


def end_in_words(exit_code: int, out_of_memory: bool) -> str:
    if exit_code == -signal.SIGKILL and out_of_memory:
        return "was ended by SIGKILL, the kernel's, as memory ran out: lower data.batch_per_rank or data.workers"
    return f"was ended by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"failed with exit code {exit_code}"

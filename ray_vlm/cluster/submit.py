"""Ray Jobs: submit a verb to a cluster, follow its logs, end with the run's own exit code; list, show and stop jobs.

Ray's own command ends with 0 or 1, and with 0 for a job that was stopped; here the code is the driver's.
"""

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ray_vlm.cluster.secrets import SECRETS_VARIABLE, send_secrets
from ray_vlm.errors import ConfigError, RunError

STOPPED = 130  # exit code of a job that was stopped and left no code of its own
_POLL_S = 1.0
_PATIENCE_S = 60.0  # of one that follows a job for hours
_LAUNCH_FILE = "jobs/runtime_env.yaml"


def connect_jobs(address: str | None) -> Any:
    """A client of the cluster's job server. Raises `RunError` with the way out where it does not answer or refuses."""
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = "Give --address http://HOST:8265 (or RAY_API_SERVER_ADDRESS), and check that the dashboard runs."
        if re.search(r"\b40[13]\b|[Aa]uthenticat|[Uu]nauthorized|token", str(error)):
            fix = "Set RAY_AUTH_MODE=token and the cluster's token in RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        raise RunError(
            f"the cluster's job server at {address or 'the default address'} refuses: {text} {fix}"
        ) from None


def entrypoint(verb: str, job: str, words: Sequence[str]) -> str:
    """The command that runs on the cluster."""
    return shlex.join(["python", "-m", "ray_vlm", verb, job, *words])


def plan_runtime_env(working_dir: Path, env_file: Path | None) -> dict[str, Any]:
    """What the job takes along: the file's settings (default: the folder's own `jobs/runtime_env.yaml`, or the one that
    ships with the package), the folder, and this package where the folder does not hold it.

    Raises `ConfigError` for a file that is not there or not a mapping.
    """
    package = Path(__file__).parents[1]
    shipped = [working_dir / _LAUNCH_FILE, package / "starter" / _LAUNCH_FILE, package.parent / _LAUNCH_FILE]
    file = env_file or next((path for path in shipped if path.is_file()), None)
    try:
        env = yaml.safe_load(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env {file}: cannot be read ({error}).") from None
    if not isinstance(env, dict) or not isinstance(env.get("env_vars", {}), dict):
        raise ConfigError(f"--runtime-env {file}: a mapping is needed, with `env_vars` a mapping of text.")
    if not (working_dir / "ray_vlm" / "__init__.py").is_file():
        env["py_modules"] = [*env.get("py_modules", []), str(package)]
    return {**env, "working_dir": str(working_dir)}


def check_job_file(job: str, working_dir: Path) -> str:
    """The job's path inside the folder that travels. Raises `ConfigError` for one outside."""
    path = Path(job).resolve()
    if not path.is_relative_to(working_dir):
        raise ConfigError(f"{job} lies outside {working_dir}, which is what the cluster gets. Give --working-dir.")
    return path.relative_to(working_dir).as_posix()


def submit(client: Any, command: str, env: Mapping[str, Any], name: str | None = None) -> str:
    """Start the command as a Ray job; returns its id. Secrets of this process go along, seen by nobody."""
    try:
        package = send_secrets(client)
        variables = {**env.get("env_vars", {}), **({SECRETS_VARIABLE: package} if package else {})}
        return client.submit_job(
            entrypoint=command,
            runtime_env={**env, "env_vars": variables},
            submission_id=name,
            metadata={"by": "ray_vlm"},
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(f"the cluster did not take the job: {_last_line(error)}") from None


def follow_job(client: Any, job: str, ask: Callable[[str], bool]) -> int:
    """Print the job's log until it ends; returns its exit code. Ctrl-C asks whether to stop it as well."""
    lines = _new_text(client, job)
    while True:
        try:
            for text in lines:
                sys.stdout.write(text)
                sys.stdout.flush()
                time.sleep(_POLL_S)
            return exit_code(ask_cluster(lambda: client.get_job_info(job), _PATIENCE_S))
        except KeyboardInterrupt:
            if not ask(f"\nstop job {job} too? It writes a checkpoint first. [y/N] "):
                print(f"job {job} goes on; `ray-vlm jobs logs {job} --follow` and `ray-vlm jobs stop {job}` reach it")
                return STOPPED
            ask_cluster(lambda: client.stop_job(job))
            lines = _new_text(client, job, lines_shown=True)


def _new_text(client: Any, job: str, lines_shown: bool = False) -> Iterator[str]:
    """What is new in the log, again and again, until the job has ended."""
    shown = len(client.get_job_logs(job)) if lines_shown else 0
    while True:
        ended = ask_cluster(lambda: client.get_job_status(job), _PATIENCE_S).is_terminal()
        text = ask_cluster(lambda: client.get_job_logs(job), _PATIENCE_S)
        yield text[shown:]
        shown = len(text)
        if ended:
            return


def exit_code(info: Any) -> int:
    """The code of the command that the job ran; what Ray says of its end where there is none."""
    status = str(getattr(info.status, "value", info.status))
    if status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code) or 1
    if status != "STOPPED":
        print(f"error: the job ended as {status}: {(info.message or '').strip()[-2000:]}", file=sys.stderr)
    return STOPPED if status == "STOPPED" else 1


def ask_cluster(do: Callable[[], Any], patience_s: float = 0.0) -> Any:
    """What `do` returns, tried again for a while where the job server stumbles. Raises `RunError` with what it said."""
    until = time.monotonic() + patience_s
    while True:
        try:
            return do()
        except (OSError, RuntimeError) as error:
            if time.monotonic() >= until:
                raise RunError(
                    f"the job server says: {_last_line(error)} Jobs go on without us; `ray-vlm jobs list` names them."
                ) from None
        time.sleep(_POLL_S)


def describe_jobs(jobs: Sequence[Any]) -> str:
    """A table of jobs, the newest first."""
    rows = [("job", "status", "started", "command")]
    for job in sorted(jobs, key=lambda j: j.start_time or 0, reverse=True):
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
        status = str(getattr(job.status, "value", job.status))
        rows.append((job.submission_id or job.job_id or "?", status, started, " ".join(job.entrypoint.split())[:80]))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows
    )


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:500] if lines else type(error).__name__

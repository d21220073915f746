"""Ray Jobs: submit a verb to a cluster, read its log, return the run's own exit code; list, show and stop jobs.

Ray's own command exits with 0 or 1, and with 0 for a stopped job; here the exit code is the driver's.
"""

import logging
import os
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml

from ray_vlm.cluster import authentication
from ray_vlm.cluster.environment import SECRETS_VARIABLE, send_secrets
from ray_vlm.cluster.package import PACKAGE_FOLDER, Archive, write_archive
from ray_vlm.errors import ConfigError, RunError
from ray_vlm.runs.text import format_table

if TYPE_CHECKING:
    import requests
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")

logger = logging.getLogger(__name__)
STOPPED = 130  # exit code of a stopped job without a code of its own
SUPPORTED_RAY = ((2, 60), (3, 0))  # at least, and below; as in pyproject.toml
_POLL_S = 1.0
PATIENCE_S = 60.0  # how long an unreachable server is retried while a job is followed
_TIMEOUT_S = (10.0, 120.0)  # for a connection, and for an answer
_LAUNCH_FILE = "jobs/runtime_env.yaml"
_SERVER_VARIABLE = "RAY_API_SERVER_ADDRESS"
_AWAY = (
    "If the cluster's head stopped, its jobs ended with it: start it again, and submit the same command with --resume. "
    "If not, the job goes on: `ray-vlm jobs list` names it, `ray-vlm jobs logs NAME --follow` follows it."
)


def connect_jobs(address: str | None) -> "JobSubmissionClient":
    """Connect to the cluster's job server. Raises `RunError` with the fix if it does not answer, refuses, or runs an
    unsupported version of Ray."""
    if address is not None:
        if "://" not in address and address != "auto":
            raise ConfigError(f"--address {address}: a job server's address has a scheme. Give http://{address}.")
        os.environ[_SERVER_VARIABLE] = address  # Ray prefers the variable to the argument
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):
        """With timeouts: Ray's own client waits forever for a machine that is gone."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> "requests.Response":
            return super()._do_request(method, endpoint, **{"timeout": _TIMEOUT_S, **options})

    for name in ("dashboard_sdk", "job.sdk"):  # they log every package that is sent
        logging.getLogger(f"ray.dashboard.modules.{name}").setLevel(logging.WARNING)
    try:
        client = Client(address)
    except _failures() as error:
        where = address or os.environ.get(_SERVER_VARIABLE) or os.environ.get("RAY_ADDRESS") or "the default address"
        fix = f"Give --address http://HOST:8265 (or {_SERVER_VARIABLE}), and check that the dashboard runs."
        raise RunError(f"the cluster's job server at {where} cannot be used: {describe_failure(error, fix)}") from None
    check_ray_version(client._server_ray_version)
    return client


def check_ray_version(version: str | None) -> None:
    """Raise `RunError` for an unsupported version of Ray on the cluster; log a warning for another one than here."""
    import ray

    numbers = tuple(int(part) for part in re.findall(r"\d+", version or "")[:2])
    if len(numbers) == 2 and not SUPPORTED_RAY[0] <= numbers < SUPPORTED_RAY[1]:
        low, high = (".".join(map(str, limit)) for limit in SUPPORTED_RAY)
        raise RunError(
            f"the cluster runs Ray {version}, and this package needs {low} or newer, below {high}. Nothing was sent. "
            f"Start the cluster with another Ray, best {ray.__version__} as here."
        )
    if version and version != ray.__version__:
        logger.warning(f"the cluster runs Ray {version}, this machine {ray.__version__}")


def _failures() -> tuple[type[Exception], ...]:
    """Return what Ray's client raises if the server refuses, is unreachable, or answers nonsense."""
    from ray.exceptions import RayError

    return OSError, RuntimeError, ValueError, RayError


def describe_failure(error: Exception, fix: str = "") -> str:
    """Describe an error of Ray's client in one sentence, with `fix`, or the fix for a missing or wrong token."""
    lines = [line.strip() for line in str(error).splitlines() if re.search(r"\w", line)] or [type(error).__name__]
    text = lines[-1 if "Traceback" in str(error) else 0][:500].rstrip(".")
    if _is_refusal(error):
        fix = authentication.FIX
    return f"{text}. {fix}".rstrip()


def _is_refusal(error: Exception) -> bool:
    """Whether a token is missing or wrong."""
    return bool(re.search(r"\b40[13]\b|[Aa]uthenticat|[Uu]nauthorized|UNAUTHENTICATED|InvalidAuthToken", str(error)))


def entrypoint(verb: str, words: Sequence[str]) -> str:
    """Return the command that runs on the cluster."""
    return shlex.join(["python", "-m", "ray_vlm", verb, *words])


def load_runtime_env(working_dir: Path, env_file: str | None) -> tuple[dict[str, Any], str]:
    """Load the runtime environment of a job, and return it with the name of its file: `env_file`, the folder's own
    `jobs/runtime_env.yaml`, or the one that ships with the package.

    Raises `ConfigError` if the file is missing or is not such a mapping.
    """
    shipped = [root / _LAUNCH_FILE for root in (working_dir, PACKAGE_FOLDER / "starter", PACKAGE_FOLDER.parent)]
    file = Path(env_file) if env_file else next((path for path in shipped if path.is_file()), None)
    try:
        env = yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--runtime-env {file}: cannot be read ({error}).") from None
    if not isinstance(env, dict) or not isinstance(env.get("env_vars", {}), dict):
        raise ConfigError(f"--runtime-env {file}: a mapping is needed, with `env_vars` a mapping of text.")
    for name in ("excludes", "py_modules"):
        if not isinstance(env.get(name, []), list) or not all(isinstance(entry, str) for entry in env.get(name, [])):
            raise ConfigError(f"--runtime-env {file}: `{name}` is a list of text.")
    if "working_dir" in env:
        raise ConfigError(f"--runtime-env {file}: `working_dir` is what --working-dir says. Take it out.")
    own = file is not None and (env_file or file == shipped[0])
    return env, (env_file or _LAUNCH_FILE) if own else f"{_LAUNCH_FILE} as it ships with the package"


def submit(
    client: "JobSubmissionClient",
    command: str,
    env: Mapping[str, Any],
    archives: tuple[Archive, Archive],
    name: str | None = None,
    driver_cpus: float | None = None,
    driver_gpus: float | None = None,
) -> str:
    """Upload the archives of the working folder and of this package, start the command as a Ray job, return its id.

    This process's tokens are sent too, unseen by others, and last, since Ray keeps them for ten minutes only.
    """
    try:
        working_dir, package = (_send(client, archive) for archive in archives)
        secrets = send_secrets(client)
        variables = {**env.get("env_vars", {}), **({SECRETS_VARIABLE: secrets} if secrets else {})}
        modules = [*env.get("py_modules", []), package]
        return client.submit_job(
            entrypoint=command,
            runtime_env={**env, "working_dir": working_dir, "py_modules": modules, "env_vars": variables},
            submission_id=name,
            metadata={"by": "ray_vlm"},
            entrypoint_num_cpus=driver_cpus,
            entrypoint_num_gpus=driver_gpus,
        )
    except _failures() as error:
        fix = "If `ray-vlm jobs list` does not show it, submit it again."
        raise RunError(f"the cluster did not take the job: {describe_failure(error, fix)}") from None


def _send(client: "JobSubmissionClient", archive: Archive) -> str:
    """Upload an archive to the cluster, unless it is there already; return its URI."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "archive.zip"
        write_archive(archive, path)
        return client._upload_package_if_needed(str(path), include_gitignore=False, is_file=True)


def new_text(client: "JobSubmissionClient", job: str, lines_shown: bool = False) -> Iterator[str]:
    """Yield the new text of the job's log at each poll, until the job has ended."""
    shown = len(client.get_job_logs(job)) if lines_shown else 0
    while True:
        ended = ask_cluster(lambda: client.get_job_status(job), PATIENCE_S).is_terminal()
        text = ask_cluster(lambda: client.get_job_logs(job), PATIENCE_S)
        yield text[shown:]
        shown = len(text)
        if ended:
            return
        time.sleep(_POLL_S)


def exit_code(info: "JobDetails") -> int:
    """Return the exit code of the job's command; without one, a code for the job's status, whose message is logged."""
    status = str(getattr(info.status, "value", info.status))
    if status == "SUCCEEDED":
        return 0
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code) or 1
    if status != "STOPPED":
        logger.error(f"error: the job ended as {status}: {(info.message or '').strip()[-2000:]}")
    return STOPPED if status == "STOPPED" else 1


def ask_cluster(request: Callable[[], T], patience_s: float = 0.0) -> T:
    """Return the result of `request`, which is retried for `patience_s` if the job server fails. Raises `RunError`."""
    deadline, retried = time.monotonic() + patience_s, False
    while True:
        try:
            return request()
        except _failures() as error:
            if _is_refusal(error) or time.monotonic() >= deadline:
                raise RunError(f"the job server says: {describe_failure(error, _AWAY if retried else '')}") from None
            if not retried:
                logger.info(f"the job server does not answer; it is asked again for {patience_s:.0f} s")
            retried = True
        time.sleep(_POLL_S)


def describe_jobs(jobs: "Sequence[JobDetails]") -> str:
    """Format a table of jobs, the newest first."""
    rows = [["job", "status", "started", "command"]]
    for job in sorted(jobs, key=lambda j: j.start_time or 0, reverse=True):
        started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime((job.start_time or 0) / 1000))
        status = str(getattr(job.status, "value", job.status))
        rows.append([job.submission_id or job.job_id or "?", status, started, " ".join(job.entrypoint.split())[:80]])
    return format_table(rows, left=range(4), longest=80)

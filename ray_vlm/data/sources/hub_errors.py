"""Turn errors of the hub's client and of `datasets` into `DataError`, with the reason and the fix."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ray_vlm.config.paths import describe_search
from ray_vlm.errors import DataError

_AGAIN = "What was fetched before is used with HF_HUB_OFFLINE=1."


@contextmanager
def hub_errors(name: str, revision: str) -> Iterator[None]:
    """Turn errors in the body, which asks the hub for data set `name`, into `DataError`."""
    from datasets.exceptions import DatasetsError
    from huggingface_hub.errors import EntryNotFoundError, HTTPError
    from yaml import YAMLError

    try:
        yield
    except (OSError, HTTPError, EntryNotFoundError, DatasetsError, ValueError, RuntimeError, YAMLError) as error:
        raise explain(error, name, revision) from None


def explain(error: BaseException, name: str, revision: str) -> DataError:
    """Return why a data set of the hub cannot be read, and the fix."""
    from huggingface_hub import constants

    chain = _chain(error)
    kinds = {kind.__name__ for link in chain for kind in type(link).__mro__}
    hub, status = constants.ENDPOINT, next((code for link in chain if (code := _status(link))), 0)
    if any(isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT) for link in chain):
        return DataError(
            f"{name}: the disk of {constants.HF_HUB_CACHE} is full. Make room there, or set HF_HOME to another disk."
        )
    if "GatedRepoError" in kinds or "is a gated dataset" in str(error):
        return DataError(
            f"{name}: gated, and this account has no access. Ask for it on {hub}/datasets/{name}, and set HF_TOKEN to "
            "a token of that account."
        )
    if "RevisionNotFoundError" in kinds:
        return DataError(f"{name}: no revision {revision!r} on {hub}. Set `revision` to a branch, a tag or a commit.")
    if "Invalid credentials" in str(error):
        return DataError(f"{name}: {hub} does not accept the token (HF_TOKEN). Set HF_TOKEN to a valid one.")
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"} or (status == 401 and not _has_token()):
        token = "the token in use may not read it" if _has_token() else "it is private, and HF_TOKEN is not set"
        return DataError(
            f"{name}: there is no such file or folder here, and no data set of this name on {hub}, or {token}."
            f"{describe_search(os.path.abspath(name))} Mend the name, or set HF_TOKEN to a token with access."
        )
    if status in (401, 403):
        return DataError(f"{name}: {hub} refuses it ({_line(error)}). Set HF_TOKEN to a token that may read it.")
    if "EmptyDatasetError" in kinds or "DataFilesNotFoundError" in kinds:
        return DataError(f"{name}: no files with rows are in it ({_line(error)}). Give another data set, or a folder.")
    if kinds & {"TransportError", "ConnectionError", "Timeout", "LocalEntryNotFoundError", "TimeoutException"}:
        return DataError(
            f"{name}: there is no such file or folder here.{describe_search(os.path.abspath(name))} It may be a data "
            f"set of the hub, but {hub} cannot be reached ({_line(chain[-1])}). Mend the path; or check the network, "
            f"its proxy and HF_ENDPOINT. {_AGAIN}"
        )
    if status:
        return DataError(f"{name}: {hub} answers with an error ({_line(error)}). Try again later. {_AGAIN}")
    return DataError(f"{name}: cannot be read from {hub} ({_line(chain[-1])}). Give a folder with its files.")


def _chain(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that it was raised because of, in this order."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _status(error: BaseException) -> int:
    return getattr(getattr(error, "response", None), "status_code", 0) or 0


def _has_token() -> bool:
    from huggingface_hub import get_token

    return get_token() is not None


def _line(error: BaseException) -> str:
    """Return an error's text in a line; its type if it is empty."""
    return " ".join(str(error).split())[:300] or type(error).__name__

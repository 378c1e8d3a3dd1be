"""Uploads to the Hugging Face Hub: a repository that may be written to, files into it, each failure as one line."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

from vla0_trl.schema import one_line


class HubError(OSError):
    """The Hub can't be written to or read from; one line that says why, and what to do."""


def open_repository(repo_id: str, repo_type: str, private: bool = True, token: str | None = None) -> str:
    """Make sure that a repository is there and that this token may write to it; returns its full id, with the owner.

    Called before hours of work: a new repository is empty until they are done. One that exists keeps its visibility.
    `HubError`: no token, one without rights, somebody else's repository, no connection.

    Args:
        repo_id (`str`): "USER/NAME", or "NAME" for the token's own user.
        repo_type (`str`): "dataset" or "model".
    """
    api = HfApi(token=token)
    with hub_errors(f"{repo_type} repository {repo_id!r} can't be written to", api):
        place = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        api.auth_check(place.repo_id, repo_type=repo_type, write=True)
    return place.repo_id


def upload(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    message: str,
    revision: str | None = None,
    token: str | None = None,
) -> str:
    """One commit with these files; returns its hash. Files that the repository has already are not sent again.

    `files` are by their names in the repository: paths, or what they hold. Large files arrive one by one and stay:
    after a broken upload, only those are sent that are still missing.
    """
    api = HfApi(token=token)
    operations = [CommitOperationAdd(name, path) for name, path in files.items()]
    options = {"repo_type": repo_type, "commit_message": message, "revision": revision}
    with hub_errors(
        f"{repo_id}: the upload was not finished", api, "; the same command again sends only what is missing"
    ):
        return api.create_commit(repo_id, operations, **options).oid


def is_hub_id(name: str | None) -> bool:
    """Whether this reads as "USER/NAME" and is not a path here; the Hub is not asked."""
    return bool(name) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).exists()


def address(repo_id: str, repo_type: str) -> str:
    """Where a browser finds a repository."""
    return f"{constants.ENDPOINT}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"


@contextmanager
def hub_errors(problem: str, api: HfApi, remedy: str = "") -> Iterator[None]:
    """What the Hub's client raises, as a [`HubError`] of one line that begins with `problem`."""
    try:
        yield
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise HubError(f"{problem}: {_reason(error, api)}{remedy}") from error
    except RuntimeError as error:  # by which it says which large file did not arrive
        if not isinstance(error.__cause__, HTTPError):
            raise
        raise HubError(f"{problem}: {error} {_reason(error.__cause__, api)}{remedy}") from error


def _reason(error: Exception, api: HfApi) -> str:
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it"
    if not isinstance(error, HfHubHTTPError):
        if isinstance(error, LocalTokenNotFoundError):
            return "not logged in: run `hf auth login`, or set HF_TOKEN"
        return f"no answer from {api.endpoint} ({type(error).__name__}: {one_line(error)})"
    status, said = error.response.status_code, error.server_message or ""
    if status == 401:
        return "not logged in, or the token is not valid: run `hf auth login`, or set HF_TOKEN"
    if status in (403, 404):
        return f"{one_line(said) or 'refused'} ({_who(api)})"
    return f"the Hub answered with status {status}: {one_line(said or error)}"


def _who(api: HfApi) -> str:
    """Whose the token is, and where that user may write."""
    try:
        user = api.whoami()
    except (HTTPError, LocalTokenNotFoundError):
        return "and it does not say whose this token is"
    role = user.get("auth", {}).get("accessToken", {}).get("role", "unknown")
    owners = [user["name"], *(organization["name"] for organization in user.get("orgs", ()))]
    may = " or ".join(f"{owner}/…" for owner in owners)
    return f"logged in as {user['name']}, the token's role is {role!r}; it needs 'write', and an id such as {may}"

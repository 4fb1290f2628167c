"""Models on the Hugging Face Hub: hf://user/name is a repository with a file model.safetensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from bcnn.utils.errors import UserError

SCHEME = "hf://"
WEIGHTS = "model.safetensors"  # all that is downloaded: opening it runs no code


def download(name: str) -> Path:
    """Return the weights in a repository, kept in the cache of huggingface_hub.

    They are those of the newest commit, or without network those that the cache has.
    """
    from huggingface_hub import hf_hub_download

    with _one_sentence(name):
        return Path(hf_hub_download(name, WEIGHTS))


def is_cached(path: Path) -> bool:
    """Return whether a file is one that `download` keeps, in folders where nothing else belongs."""
    return any(part.startswith("models--") for part in path.parts)


def upload(name: str, files: Mapping[str, Path | bytes], private: bool) -> str:
    """Put files into a repository, made if necessary, in one commit; return its address."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, added = HfApi(), [CommitOperationAdd(path, content) for path, content in files.items()]
    with _one_sentence(name):
        # Not False, which would overrule an organisation that makes all of its repositories private.
        address = api.create_repo(name, private=private or None, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(f"--private: {name} exists and is public: make it private, or name another")
        api.create_commit(name, added, commit_message="bcnn push")
    return str(address)


@contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Make what huggingface_hub raises a UserError."""
    from huggingface_hub import errors

    try:
        if "/" not in name:
            raise errors.HFValidationError
        yield
    except errors.HFValidationError as error:
        raise UserError(f"{name!r} is no name of a repository: give user/name") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"the hub has no repository {name} that you may use: check the name, or log in by "
            "`hf auth login`"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise UserError(
            f"{SCHEME}{name} is not in the cache, and the hub cannot be reached: check the network, "
            "HF_ENDPOINT and HF_HUB_OFFLINE"
        ) from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{SCHEME}{name} has no {WEIGHTS}: only what `bcnn push` wrote can be opened"
        ) from error
    except (OSError, errors.HTTPError, RuntimeError) as error:  # the last: an upload broke off
        reason = getattr(error, "server_message", None) or str(error).strip().partition("\n")[0]
        raise UserError(
            f"{SCHEME}{name}: {reason.rstrip('.')}: check the network, the disk and the token (log in "
            "by `hf auth login`, or set HF_TOKEN)"
        ) from error

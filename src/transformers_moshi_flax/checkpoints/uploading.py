"""Uploading to the Hugging Face Hub: what will not do is refused before a repository, a branch or a commit is made."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from .formats import parse_json

logger = logging.get_logger(__name__)

_BRANCH = re.compile(
    r"(?!.*(\.\.|//|@\{|\.lock(/|$)|/\.))[^\x00-\x20\x7f~^:?*\[\\/.-][^\x00-\x20\x7f~^:?*\[\\]*(?<![/.])"
)
"""What git allows."""


@dataclasses.dataclass(frozen=True)
class Repository:
    """A repository of models as it is before an upload.

    Attributes:
        api: the client.
        name: with its owner.
        info: of the revision that is uploaded to, or of the main one if there is no such branch; None if there is no
            such repository.
    """

    api: Any
    name: str
    info: Any = None

    @classmethod
    def look_up(
        cls, repo_id: str, *, token: str | bool | None = None, private: bool | None = None, revision: str | None = None
    ) -> Repository:
        """What is there; nothing is made.

        Args:
            repo_id: a name, with its owner or of the one whose token it is.
            token: as in ``huggingface_hub``.
            private: as it is to be made, or to be already; None does not mind.
            revision: a branch, which need not be there, or ``refs/pr/N``.

        Raises:
            ValueError: no name of a repository or branch; ``private`` for a public repository.
        """
        from huggingface_hub import HfApi  # only here: an HTTP client
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(repo_id)
        check_upload(private=private, revision=revision)
        api = HfApi(token=token)
        name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        try:
            info = api.repo_info(name)
        except RepositoryNotFoundError:
            return cls(api, name)
        if private and not info.private:
            raise ValueError(
                f"private=True, but the repository {name!r} is public, and an upload would be published: nothing is "
                f"uploaded. Make it private first (HfApi().update_repo_settings({name!r}, private=True)), upload to "
                "another one, or leave private out"
            )
        if private is False and info.private:
            logger.warning(f"private=False, but the repository {name!r} is private, and stays so")
        if revision is not None:
            try:
                info = api.repo_info(name, revision=revision)
            except RevisionNotFoundError:
                if revision.startswith("refs/"):
                    raise
        return cls(api, name, info)

    def made(self, *, private: bool | None = None, revision: str | None = None) -> Repository:
        """The repository with its branch, which are made if they are not there."""
        if self.info is None:
            self.api.create_repo(self.name, exist_ok=True, private=private)
        if revision is not None and not revision.startswith("refs/"):
            self.api.create_branch(self.name, branch=revision, exist_ok=True)
        if self.info is not None and revision is None:
            return self
        # somebody else may have made it meanwhile
        return type(self).look_up(self.name, token=self.api.token, private=private, revision=revision)

    def filenames(self) -> list[str]:
        """The files that it has."""
        return [] if self.info is None else [file.rfilename for file in self.info.siblings]

    def text(self, filename: str) -> str | None:
        """A text file's content, None if there is none."""
        if filename not in self.filenames():
            return None
        with tempfile.TemporaryDirectory() as scratch:
            path = self.api.hf_hub_download(self.name, filename, revision=self.info.sha, cache_dir=scratch)
            return Path(path).read_text("utf-8", errors="replace")

    def check_card(self, card: str) -> None:
        """ValueError for a model card that the Hub refuses, in its words."""
        from huggingface_hub import ModelCard

        try:
            ModelCard(card).validate()
        except ValueError as error:
            raise ValueError(f"the Hub refuses the model card for {self.name!r}: {_told(str(error))}") from error

    def commit(
        self,
        folder: Path,
        names: Sequence[str],
        removed: Sequence[str] = (),
        *,
        message: str,
        description: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload files of ``folder`` and remove others as one commit on what was looked up; its ``CommitInfo``."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        return self.api.create_commit(
            self.name,
            [
                *(CommitOperationDelete(name) for name in removed),
                *(CommitOperationAdd(name, folder / name) for name in names),
            ],
            commit_message=message,
            commit_description=description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=self.info.sha,
        )


def check_upload(*, private: Any = None, revision: Any = None, use_temp_dir: Any = None) -> None:
    """ValueError for options of an upload that cannot be followed."""
    if private is not None and not isinstance(private, bool):
        raise ValueError(f"private={private!r} must be True, False, or None, which leaves it to the Hub")
    if revision is not None and not (isinstance(revision, str) and _BRANCH.fullmatch(revision)):
        raise ValueError(f"revision={revision!r} is no name of a branch; give one without spaces, such as 'draft'")
    if use_temp_dir is not None and not isinstance(use_temp_dir, bool):
        raise ValueError(f"use_temp_dir={use_temp_dir!r} must be True, False or None")
    if use_temp_dir is False:
        logger.warning(
            "use_temp_dir=False: what is pushed is always saved to a temporary directory; to keep the files, use "
            "save_pretrained(directory, push_to_hub=True)"
        )


def _told(answer: str) -> str:
    """The messages in the Hub's answer about a card."""
    try:
        messages = [error["message"] for error in parse_json(answer)["errors"]]
    except (ValueError, KeyError, TypeError):
        return answer
    return "; ".join(map(str, messages)) or answer

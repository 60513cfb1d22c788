"""``FlaxProcessorMixin``: saving, loading and uploading of processors."""

from __future__ import annotations

import os
from collections.abc import Sequence, Set
from pathlib import Path
from typing import Any, ClassVar

from transformers import ProcessorMixin

from .checkpoints.configs import did_you_mean
from .checkpoints.keywords import one_token, understood
from .checkpoints.replacing import whole_files
from .checkpoints.uploading import Repository, check_upload
from .model_card import check_card_fields


class FlaxProcessorMixin(ProcessorMixin):
    """A feature extractor and a tokenizer with options.

    Class attributes that a processor sets:
        options: arguments of its class beside the two, which its files keep.
    """

    options: ClassVar[tuple[str, ...]] = ()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        commit_description: str | None = None,
        create_pr: bool = False,
        use_auth_token: str | bool | None = None,
        max_shard_size: Any = None,
    ) -> list[str]:
        """Write the tokenizer's files and ``processor_config.json``, which holds the feature extractor too.

        Args:
            save_directory: made if it is not there.
            push_to_hub: also upload the files.
            repo_id: where to upload to, the name of the directory if None.
            private, token, revision, commit_message, commit_description, create_pr, use_auth_token: of the upload, as
                in :meth:`push_to_hub`.
            max_shard_size: of models; a processor has no weights.

        Returns:
            The paths of the files.

        Raises:
            ValueError: there is a file in place of the directory; options of the upload without ``push_to_hub``, or
                what :meth:`push_to_hub` refuses, before anything is written.
            OSError: the directory cannot be written or the disk is full; the old files are untouched.
        """
        folder = Path(os.path.abspath(save_directory))
        if folder.is_file():
            raise ValueError(f"save_directory={str(folder)!r} is a file; give a directory")
        there = None
        if push_to_hub:
            token = one_token(token, use_auth_token)
            there = Repository.look_up(repo_id or folder.name, token=token, private=private, revision=revision)
        else:
            options = {
                "repo_id": repo_id,
                "private": private,
                "revision": revision,
                "commit_message": commit_message,
                "commit_description": commit_description,
                "create_pr": create_pr,
            }
            if idle := [f"{name}={value!r}" for name, value in options.items() if value]:
                raise ValueError(f"{', '.join(idle)} has no effect without push_to_hub=True")
        with whole_files(folder) as staged:
            super().save_pretrained(str(staged))
            names = sorted(str(path.relative_to(staged)) for path in staged.rglob("*") if path.is_file())
        if there is not None:
            there.made(private=private, revision=revision).commit(
                folder,
                names,
                message=commit_message or f"Upload {type(self).__name__}",
                description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        return [str(folder / name) for name in names]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        tags: Sequence[str] | None = None,
        use_temp_dir: bool | None = None,
        use_auth_token: str | bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the processor's files, as ``transformers`` does, with a card if there is none.

        Args:
            repo_id: the repository, made if it is not there.
            private: True makes a repository that is not there a private one, and refuses one that is public.
            token, revision: as in ``huggingface_hub``; the branch is made if it is not there.
            tags: of the card.
            use_temp_dir, use_auth_token: as of a model's ``push_to_hub``.
            **kwargs: ``commit_message``, ``commit_description``, ``create_pr``.

        Returns:
            The ``CommitInfo`` of ``huggingface_hub``.

        Raises:
            ValueError: ``private`` for a public repository, tags or a branch that the Hub refuses, before anything is
                made there.
        """
        check_upload(use_temp_dir=use_temp_dir)
        check_card_fields({} if tags is None else {"tags": tags})
        token = one_token(token, use_auth_token)
        Repository.look_up(repo_id, token=token, private=private, revision=revision)
        return super().push_to_hub(
            repo_id,
            private=private,
            token=token,
            revision=revision,
            tags=None if tags is None else list(tags),
            **kwargs,
        )

    @classmethod
    def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A processor of these parts with the options among ``processor_dict`` and, before them, ``kwargs``."""
        # upstream reads the options' names off __init__'s code object, and loses them if __init__ is decorated
        options = {**processor_dict, **kwargs}
        return cls(*args, **{name: options[name] for name in cls.options if name in options})


def known_keywords(method: str, keywords: dict[str, Any], known: Set[str]) -> dict[str, Any]:
    """Those that ``method`` follows; ValueError for one that it does not know, or that it would be wrong to ignore."""
    given = understood(None, None, keywords.pop("token", None), keywords)
    for name in given.rest:
        if name not in known:
            raise ValueError(f"{method} has no keyword argument {name!r}{did_you_mean(name, known)}")
    return given.rest if given.token is None else {**given.rest, "token": given.token}

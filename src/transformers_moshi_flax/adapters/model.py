"""What models do with adapters: ``transformers``' names, and PEFT's where it has none."""

from __future__ import annotations

import abc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from operator import is_ as _is
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from transformers import PreTrainedConfig

from ..checkpoints.configs import did_you_mean
from ..checkpoints.files import Source
from ..checkpoints.rules import Rule
from ..checkpoints.uploading import Repository, check_upload
from .config import LoraConfig
from .files import is_of_kyutai, read_adapter, write_adapter
from .lora import (
    BASE,
    Adapter,
    by_row,
    check_trained,
    joined,
    merged_kernels,
    new_leaves,
    parameter_count,
    trained_leaves,
    with_leaves,
)
from .targets import Linear, linear_layers, saved_whole, targeted

DEFAULT = "default"

FORMATS = ("peft", "kyutai")

CARD = """\
---
base_model: {base}
library_name: transformers-moshi-flax
tags: [lora, moshi]
---

# A LoRA adapter{of}

Rank {rank}, {count:,} numbers, in {owner}'s format, for [transformers-moshi-flax](https://pypi.org/project/transformers-moshi-flax):
`model.load_adapter("...")`. {others}
"""

OTHERS = {
    "peft": ("PEFT", "`peft` loads it into `transformers`' PyTorch model."),
    "kyutai": (
        "Kyutai",
        "So does `python -m moshi.server --lora-weight lora.safetensors --config-path config.json`.",
    ),
}


def adapter_card(adapter: Adapter, format: str = "peft") -> str:
    """The text of an adapter's ``README.md``, in one of :data:`FORMATS`."""
    owner, others = OTHERS[format]
    base = adapter.config.base_model_name_or_path
    return CARD.format(
        base=base or "",
        of=f" of {base}" if base else "",
        rank=adapter.config.r,
        count=parameter_count(adapter.leaves),
        owner=owner,
        others=others,
    )


_OF_THE_WHOLE = "take FlaxMoshiForConditionalGeneration"


class FlaxAdapterMixin:
    """Adapters of a model, which are put into its parameters for every call; the model's own stay as they are.

    A model that has been made with ``_do_init=False`` keeps adapters as well; :meth:`adapted_params` puts them into
    the parameters that are kept outside.
    """

    config: PreTrainedConfig
    checkpoint_rules: ClassVar[tuple[Rule, ...]]
    params: Any
    name_or_path: str | None
    hub_id: str | None
    _is_initialized: bool
    _whole: Any
    _float_shape_tree: dict[str, Any]
    quantization: Any
    _refuse_quantized: Callable[[str], None]

    @property
    @abc.abstractmethod
    def params_shape_tree(self) -> dict[str, Any]:
        """The tree with a ``jax.ShapeDtypeStruct`` for each parameter."""

    # names in the order in which they came, and what is active; made when the first adapter comes
    _adapters: dict[str, Adapter]
    _active: list[str]
    _adapters_enabled: bool = True
    _adapted: Any = None
    _before_merge: dict[str, Any] | None = None

    # ------------------------------------------------------------------------------------------------ which there are

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """The configurations of all adapters by name."""
        return {name: adapter.config for name, adapter in self._all_adapters().items()}

    def _all_adapters(self) -> dict[str, Adapter]:
        return vars(self).setdefault("_adapters", {})

    def active_adapters(self) -> list[str]:
        """The names of the adapters that calls use.

        Raises:
            ValueError: there is none at all.
        """
        self._need_adapters()
        return list(self._active) if self._adapters_enabled else []

    def _need_adapters(self) -> None:
        if not self._all_adapters():
            raise ValueError("the model has no adapter: add_adapter or load_adapter makes one")

    def _named(self, names: str | Sequence[str]) -> list[str]:
        """Names of adapters, checked."""
        names = [names] if isinstance(names, str) else list(names)
        known = self._all_adapters()
        for name in names:
            if name not in known:
                raise ValueError(
                    f"there is no adapter {name!r}{did_you_mean(name, known)}; there are {', '.join(known) or 'none'}"
                )
        return names

    def _refuse_merged(self, what: str) -> None:
        if self._before_merge is not None:
            raise ValueError(f"{what}: adapters are merged into the weights; unmerge_adapter first")

    def _linear_layers(self) -> dict[str, Linear]:
        return linear_layers(self._float_shape_tree, self.checkpoint_rules)

    def _checked_base(self) -> Any:
        """The parameters that an adapter's checksum is of; None for a quantized base, whose floats are not known."""
        return self.params if self.quantization is None and self._is_initialized else None

    # ------------------------------------------------------------------------------------- coming, going, being active

    def add_adapter(self, adapter_config: LoraConfig, adapter_name: str | None = None, seed: int = 0) -> None:
        """Add a new adapter, which becomes the active one.

        Args:
            adapter_config: what it is like.
            adapter_name: its name; ``"default"`` if None.
            seed: of its random numbers.

        Raises:
            ValueError: a name that is taken, a target that the model does not have, merged weights.
        """
        name = self._new_name(adapter_name)
        if not isinstance(adapter_config, LoraConfig):
            raise ValueError(f"adapter_config must be a LoraConfig, but is {type(adapter_config).__name__}")
        layers = targeted(adapter_config, self._linear_layers())
        leaves = new_leaves(adapter_config, layers, jax.random.key(seed))
        whole = saved_whole(adapter_config, self._float_shape_tree, self.checkpoint_rules)
        if whole:
            flat = flatten_dict(self.params, sep="/")
            if not flat.keys() >= set(whole):
                self._refuse_quantized(f"`modules_to_save`={adapter_config.modules_to_save!r}")
            leaves |= {path: flat[path] for path in whole}
        if adapter_config.base_model_name_or_path is None:
            adapter_config.base_model_name_or_path = self.hub_id or self.name_or_path
        self._keep_adapter(name, Adapter(adapter_config, layers, leaves))

    def _new_name(self, name: str | None) -> str:
        self._refuse_merged("add_adapter, load_adapter")
        name = DEFAULT if name is None else name
        if name in self._all_adapters() or name == BASE or not name:
            raise ValueError(f"adapter_name={name!r} is taken or reserved; give another")
        return name

    def _keep_adapter(self, name: str, adapter: Adapter) -> None:
        self._all_adapters()[name] = adapter
        self._active, self._adapters_enabled = [name], True

    def load_adapter(
        self,
        peft_model_id: str | Path,
        adapter_name: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        subfolder: str = "",
        verify_base: bool = True,
    ) -> None:
        """Load an adapter that PEFT, Kyutai's ``moshi-finetune`` or :meth:`save_adapter` has written; it becomes the
        active one.

        Args:
            peft_model_id: a directory, or an id on the Hub; of Kyutai's also the file of the weights.
            adapter_name: its name; ``"default"`` if None.
            revision, token, subfolder: as in ``from_pretrained``.
            verify_base: refuse an adapter that :meth:`save_adapter` has written for other weights; of a quantized
                model that cannot be told.

        Raises:
            CheckpointNotFoundError: there is no adapter.
            ValueError: as :meth:`add_adapter`; files that are damaged or do not fit the model.
        """
        name = self._new_name(adapter_name)
        source = Source.locate(peft_model_id, subfolder=subfolder, revision=revision, token=token)
        if is_of_kyutai(source):
            adapter = self._read_kyutai_adapter(source, verify_base)
        else:
            params = self._checked_base() if verify_base else None
            adapter = read_adapter(
                source, self._linear_layers(), self.checkpoint_rules, self._float_shape_tree, params
            )
        adapter.leaves = {path: jnp.asarray(leaf) for path, leaf in adapter.leaves.items()}
        self._keep_adapter(name, adapter)

    def set_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Make an adapter the active one; of several, the changes are added.

        Raises:
            ValueError: a name that is none, merged weights.
        """
        self._refuse_merged("set_adapter")
        names = self._named(adapter_name)
        joined([self._all_adapters()[name] for name in names])
        self._active, self._adapters_enabled = names, True

    def disable_adapters(self) -> None:
        """Calls use the model as it is, until :meth:`enable_adapters`."""
        self._need_adapters()
        self._refuse_merged("disable_adapters")
        self._adapters_enabled = False

    def enable_adapters(self) -> None:
        """The reverse of :meth:`disable_adapters`."""
        self._need_adapters()
        self._adapters_enabled = True

    def delete_adapter(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters.

        Raises:
            ValueError: a name that is none, merged weights.
        """
        self._refuse_merged("delete_adapter")
        for name in self._named(adapter_names):
            del self._all_adapters()[name]
            self._active = [each for each in self._active if each != name]

    def adapter_leaves(self, adapter_name: str | None = None) -> dict[str, Any]:
        """What is trained of an adapter by "/"-joined path: A and B of its layers, and parameters that it has instead
        of the model's. The active one if None."""
        return trained_leaves(self._one_adapter(adapter_name).leaves)

    def with_adapter_leaves(
        self, leaves: Mapping[str, Any], adapter_name: str | None = None, params: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Parameters with an adapter whose :meth:`adapter_leaves` are these, which may be traced: what a loss that is
        differentiated by them gives to the module.

        Args:
            leaves: the paths and shapes of :meth:`adapter_leaves`.
            adapter_name: the active one if None.
            params: of the model, its own if None.

        Raises:
            ValueError: other paths or shapes.
        """
        adapter = self._one_adapter(adapter_name)
        check_trained(trained_leaves(adapter.leaves), leaves)
        return with_leaves(self.params if params is None else params, {**adapter.leaves, **leaves})

    def set_adapter_leaves(self, leaves: Mapping[str, Any], adapter_name: str | None = None) -> None:
        """Other values for :meth:`adapter_leaves`.

        Raises:
            ValueError: other paths or shapes, merged weights.
        """
        self._refuse_merged("set_adapter_leaves")
        adapter = self._one_adapter(adapter_name)
        check_trained(trained_leaves(adapter.leaves), leaves)
        adapter.leaves = {**adapter.leaves, **{path: jnp.asarray(leaf) for path, leaf in leaves.items()}}

    def _one_adapter(self, name: str | None) -> Adapter:
        self._need_adapters()
        if name is None:
            if len(self._active) != 1:
                raise ValueError(f"adapter_name: {len(self._active)} adapters are active; name one")
            name = self._active[0]
        return self._all_adapters()[self._named(name)[0]]

    # ---------------------------------------------------------------------------------------------- what calls compute

    def adapted_params(
        self, params: Mapping[str, Any] | None = None, adapter_names: str | Sequence[str | None] | None = None
    ) -> Any:
        """Parameters with adapters in them, for ``params=`` of any call.

        Args:
            params: of the model, its own if None.
            adapter_names: one name for all rows, or a name for each row of the batch (None or ``"__base__"``: no
                adapter); the active ones if None.

        Raises:
            ValueError: a name that is none; an adapter with parameters instead of the model's for single rows.
        """
        params = self.params if params is None else params
        known = self._all_adapters()
        if adapter_names is None:
            names = self._active if known and self._adapters_enabled and self._before_merge is None else []
            return self._with_active(params, [known[name] for name in names]) if names else params
        self._refuse_merged("adapter_names")
        if isinstance(adapter_names, str):
            return with_leaves(params, joined([known[name] for name in self._named(adapter_names)]))
        rows = [None if name == BASE else name for name in adapter_names]
        names = self._named(list(dict.fromkeys(name for name in rows if name is not None)))
        if not names:
            return params
        numbers = [len(names) if name is None else names.index(name) for name in rows]
        return with_leaves(params, by_row([known[name] for name in names], numbers))

    def _with_active(self, params: Any, adapters: list[Adapter]) -> Any:
        """The parameters with these adapters; the last result is kept, as a stream asks in every step."""
        leaves = [adapter.leaves for adapter in adapters]
        kept = vars(self).get("_adapted")
        if kept is not None and kept[0] is params and len(kept[1]) == len(leaves) and all(map(_is, kept[1], leaves)):
            return kept[2]
        self._adapted = params, leaves, with_leaves(params, joined(adapters))
        return self._adapted[2]

    def adapters_drop(self) -> bool:
        """Whether the active adapters, of a part those of the whole, drop some of their inputs in training."""
        whole = self if self._whole is None else self._whole
        active = whole.active_adapters() if whole.peft_config else []
        return any(whole.peft_config[name].lora_dropout for name in active)

    def num_adapter_parameters(self) -> int:
        """How many numbers of the active adapters are trained."""
        known = self._all_adapters()
        return sum(parameter_count(known[name].leaves) for name in (self._active if known else []))

    def print_trainable_parameters(self) -> None:
        """Print how many numbers are trained, and of how many; PEFT's line."""
        trained = self.num_adapter_parameters()
        total = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(self._float_shape_tree))
        total += sum(parameter_count(adapter.leaves) for adapter in self._all_adapters().values())
        print(f"trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f}")

    def merge_adapter(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Put adapters into the weights: calls cost what they cost without one, and ``save_pretrained`` saves them.

        The weights that are changed are kept until :meth:`unmerge_adapter`, which is exact.

        Args:
            adapter_names: the active ones if None.

        Raises:
            ValueError: a name that is none, adapters are merged already, or the weights are quantized.
        """
        self._need_adapters()
        self._refuse_quantized("merge_adapter")
        self._refuse_merged("merge_adapter")
        names = self._active if adapter_names is None else self._named(adapter_names)
        changed = merged_kernels(self.params, [self._all_adapters()[name] for name in names])
        flat = flatten_dict(self.params, sep="/")
        self._before_merge = {path: flat[path] for path in changed}
        self.params = with_leaves(self.params, changed)

    def unmerge_adapter(self) -> None:
        """Take the adapters out of the weights again, to the bit.

        Raises:
            ValueError: none is merged.
        """
        if self._before_merge is None:
            raise ValueError("unmerge_adapter: no adapter is merged")
        self.params = with_leaves(self.params, self._before_merge)
        self._before_merge = None

    # --------------------------------------------------------------------------------------------------------- files

    def save_adapter(
        self, save_directory: str | Path, adapter_name: str | None = None, *, format: str = "peft"
    ) -> None:
        """Write an adapter, as one commit.

        Args:
            save_directory: is made; an adapter that it has is replaced.
            adapter_name: which one; the active one if None.
            format: ``"peft"``, or ``"kyutai"`` for the ``moshi`` package: the same changes of the layers, all with one
                rank and one scaling.

        Raises:
            ValueError: another format, or Kyutai's cannot express the adapter or the model.
        """
        self._write_adapter(Path(save_directory), adapter_name, format)

    def _write_adapter(self, folder: Path, adapter_name: str | None, format: str) -> list[str]:
        if format not in FORMATS:
            raise ValueError(f"format={format!r} is none of {', '.join(map(repr, FORMATS))}")
        adapter, params = self._one_adapter(adapter_name), self._checked_base()
        if format == "kyutai":
            self._refuse_quantized("format='kyutai'")
        if self._before_merge is not None:
            params = with_leaves(self.params, self._before_merge)
        if format == "kyutai":
            return self._write_kyutai_adapter(folder, adapter, params)
        return write_adapter(folder, adapter, self.checkpoint_rules, params, adapter_card(adapter))

    def _read_kyutai_adapter(self, source: Source, verify_base: bool) -> Adapter:
        raise ValueError(f"{source.name} is an adapter of Kyutai's, which is of the whole of Moshi: {_OF_THE_WHOLE}")

    def _write_kyutai_adapter(self, folder: Path, adapter: Adapter, params: Mapping[str, Any]) -> list[str]:
        raise ValueError(f"format='kyutai' is of the whole of Moshi: {_OF_THE_WHOLE}")

    def push_adapter_to_hub(
        self,
        repo_id: str,
        adapter_name: str | None = None,
        *,
        format: str = "peft",
        base_model_name_or_path: str | None = None,
        commit_message: str | None = None,
        token: str | bool | None = None,
        private: bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> Any:
        """Upload an adapter, with a card that says its base model, as one commit.

        Args:
            repo_id: the repository, made if it is not there.
            adapter_name: which one; the active one if None.
            format: as in :meth:`save_adapter`.
            base_model_name_or_path: the id of the base model on the Hub, which the adapter tells from now on; needed
                where the model was loaded from a directory.
            commit_message, token, private, revision, create_pr: as in ``push_to_hub``.

        Returns:
            The ``CommitInfo`` of ``huggingface_hub``.

        Raises:
            ValueError: as :meth:`save_adapter`, or the base model is a directory, which others have not.
        """
        check_upload(private=private, revision=revision)
        config = self._one_adapter(adapter_name).config
        base = base_model_name_or_path or config.base_model_name_or_path
        if base is not None and (Path(base).exists() or base.count("/") > 1 or base.startswith((".", "/", "~"))):
            raise ValueError(
                f"base_model_name_or_path={base!r} is a directory, which others have not: pass "
                "base_model_name_or_path= with the id of the base model on the Hub"
            )
        config.base_model_name_or_path = base
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            names = self._write_adapter(folder, adapter_name, format)
            there = Repository.look_up(repo_id, token=token, private=private, revision=revision)
            there.check_card((folder / "README.md").read_text("utf-8"))
            there = there.made(private=private, revision=revision)
            message = commit_message or "Upload adapter"
            return there.commit(folder, names, message=message, revision=revision, create_pr=create_pr)

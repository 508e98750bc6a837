"""How our classes are saved and sent: what `save_pretrained` writes explains itself, and `push_to_hub` sends the same.

transformers would send a card of its own that says nothing, and copy the file of a class into the folder.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import HfApi

from acformer.errors import UsageError
from acformer.hf.auto_map import IS_INSTALLED, write_modules

CARD = "README.md"
HUB_OPTIONS = ("commit_message", "commit_description", "private", "revision", "create_pr")
NUM_SAMPLED = 64
"""So many values of each weight, or a few more, tell a model from another."""


class Published:
    """Base of config, model and processor, before transformers' own base."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = None) -> None:
        """Nothing to note: map and modules are written in any case."""
        if not IS_INSTALLED:  # beside a self-contained model transformers copies the code itself
            super().register_for_auto_class(*([] if auto_class is None else [auto_class]))  # type: ignore[misc]

    def save_pretrained(
        self, save_directory: str | os.PathLike, *args: Any, push_to_hub: bool = False, **kwargs: Any
    ) -> Any:
        """As transformers', and what the folder needs to explain itself; with `push_to_hub` the whole folder is sent.

        repo_id and other options of `push_to_hub` are taken with it; by default the repository has the folder's name.

        Raises:
            UsageError: weights in few bits that transformers cannot save (quanto's).
        """
        quantizer = getattr(self, "hf_quantizer", None)
        if quantizer is not None and not quantizer.is_serializable():
            raise UsageError(
                f"{type(quantizer).__name__}: transformers cannot save weights in its few bits; save state_dict() and "
                "quantization_map() as docs/export.md shows, or take bitsandbytes or torchao"
            )
        if not IS_INSTALLED:
            return super().save_pretrained(save_directory, *args, push_to_hub=push_to_hub, **kwargs)  # type: ignore[misc]
        folder = Path(save_directory)
        hub = {name: kwargs.pop(name) for name in ("repo_id", *HUB_OPTIONS) if push_to_hub and name in kwargs}
        result = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        if kwargs.get("is_main_process", args[0] if args else True) and folder.is_dir():
            self._complete(folder)
            if push_to_hub:
                push_folder(folder, hub.pop("repo_id", folder.name), token=kwargs.get("token"), **hub)
        return result

    def push_to_hub(
        self, repo_id: str, *, token: Any = None, max_shard_size: Any = None, tags: list[str] | None = None, **hub: Any
    ) -> Any:
        """Save, and send all of it as one commit; a card that is in the repository already stays.

        Args:
            repo_id: where to; made if it is not there.
            token, max_shard_size: as in transformers. tags: further tags of the card.
            hub: commit_message, commit_description, private, revision, create_pr.
        """
        with TemporaryDirectory() as place:
            folder = Path(place)
            self.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
            if IS_INSTALLED:
                from acformer.hf.card import sign

                sign(folder, repo_id, tags or [])
            return push_folder(folder, repo_id, token=token, **hub)

    def _complete(self, folder: Path) -> None:
        write_modules(folder)


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    token: Any = None,
    private: bool | None = None,
    revision: str | None = None,
    **hub: Any,
) -> Any:
    """Send a model's folder, without evaluations that lie in it; returns what the hub says of the commit."""
    api = HfApi()
    name = api.create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
    left_out = ["eval/*", *([CARD] if api.file_exists(name, CARD, revision=revision, token=token) else [])]
    return api.upload_folder(
        repo_id=name,
        folder_path=str(folder),
        commit_message=hub.pop("commit_message", None) or "Upload an acformer model",
        token=token,
        revision=revision,
        ignore_patterns=left_out,
        **hub,
    )


def weights_fingerprint(model: torch.nn.Module) -> str:
    """Of a model's weights: one that was trained on has another. "" where processes share them out: it learns."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        if hasattr(weight, "full_tensor"):  # to gather it all processes would have to ask
            return ""
        # (at most 2 NUM_SAMPLED,) values of each weight: a step of the optimizer changes nearly all of them.
        sample = weight.detach().flatten()[:: max(1, weight.numel() // NUM_SAMPLED)]
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def card_of(model: torch.nn.Module, folder: str | os.PathLike | None) -> Mapping[str, str]:
    """The card in the folder that a model was loaded from, and by which weights it is known; nothing without one.

    Nothing of a quantised model either, which is another than the card is about.
    """
    path = Path(folder or "", CARD)
    is_other = getattr(model, "is_quantized", False) or any(weight.is_meta for weight in model.parameters())
    if folder is None or not path.is_file() or is_other:
        return {}
    return {"text": path.read_text(encoding="utf-8", errors="replace"), "weights": weights_fingerprint(model)}

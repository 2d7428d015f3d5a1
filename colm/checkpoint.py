"""A checkpoint: a directory with config.json, model.safetensors and, for models that read text, tokenizer.json.

Each chain's block of a weight is a tensor of its own, so opening scale i touches nothing of the later chains.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from colm.errors import CheckpointError
from colm.files import MAX_TOKENIZER_BYTES, read_bytes, read_json_object, require_weights
from colm.finite import NOT_FINITE, is_finite
from colm.huge_pages import side_by_side
from colm.model import ChainTransformer, parameter_shapes
from colm.model.config import ChainConfig
from colm.model.weights import WeightLayout, lay_out_in_panels
from colm.placement import CPU
from colm.staging import staged

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
FORMAT = "colm-checkpoint"
FORMAT_VERSION = 1
_MAX_ENDS = 1 << 10
_MAX_TEMPLATE_CHARS = 1 << 20
_STORED_DTYPES = {"F32", "BF16", "F16"}
# One key, since the order of several in a file differs from run to run. Older builds had not looked for NaN.
_DIGEST_KEY, _OLDER_DIGEST_KEY = "backbone_sha256_of_finite_weights", "backbone_sha256"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig:
    """How text becomes a prompt, and which token ends an answer."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    """Any of these ends an answer."""
    add_bos: bool = False
    """Raw completions start with `bos_token_id`; a chat template writes its own."""
    chat_template: str | None = None
    """Jinja template over `messages`; None for a base model."""

    def __post_init__(self) -> None:
        ends = self.eos_token_ids
        if not isinstance(ends, tuple) or len(ends) > _MAX_ENDS:
            raise ValueError(f"eos_token_ids must be a list of at most {_MAX_ENDS} token ids")
        for name, token_id in [("bos_token_id", self.bos_token_id), *(("eos_token_ids", end) for end in ends)]:
            if token_id is None and name == "bos_token_id":
                continue
            if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < 1 << 31:
                raise ValueError(f"{name} must be a token id, 0 or more, not {token_id!r:.80}")
        if not isinstance(self.add_bos, bool):
            raise ValueError("add_bos must be true or false")
        template = self.chat_template
        if template is not None and (not isinstance(template, str) or len(template) > _MAX_TEMPLATE_CHARS):
            raise ValueError(f"chat_template must be text of at most {_MAX_TEMPLATE_CHARS} characters")


class WeightSource(Protocol):
    """What a prefill reads a model from: a checkpoint, or a benchmark's random weights."""

    @property
    def config(self) -> ChainConfig:
        """Shape of the model."""

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The named tensors, of the shapes that `parameter_shapes` gives."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An opened and checked checkpoint. Weights stay on disk until they are asked for."""

    path: Path
    config: ChainConfig
    text: TextConfig

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Self:
        """Read the config and the weights' header, and check that they agree.

        Raises:
            CheckpointError: names what is missing, truncated or misshapen.
        """
        root = Path(path)
        config, text = _read_config(root / CONFIG_FILE)
        checkpoint = cls(root, config, text)
        checkpoint._check_tensors()
        return checkpoint

    @property
    def weights_path(self) -> Path:
        """The file that holds every tensor."""
        return self.path / WEIGHTS_FILE

    @property
    def tokenizer_path(self) -> Path | None:
        """The tokenizer's file; None where the model serves token ids only."""
        path = self.path / TOKENIZER_FILE
        return path if path.exists() else None

    def dtype(self) -> torch.dtype:
        """The dtype in which the weights are stored."""
        return next(iter(self.tensors(["embedding.chain1"]).values())).dtype

    def tokenizer_json(self) -> bytes | None:
        """Contents of the tokenizer's file; None where there is none.

        Raises:
            CheckpointError: it is no plain file, or far too large.
        """
        path = self.tokenizer_path
        return None if path is None else read_bytes(path, MAX_TOKENIZER_BYTES)

    def tensors(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Map the named tensors into memory; the file's other bytes are not touched.

        Raises:
            CheckpointError: the file is truncated or lacks one of them.
        """
        with self._reader() as reader:
            return {name: reader.get_tensor(name) for name in names}

    def require_finite(self, names: Iterable[str]) -> None:
        """Refuse weights of which the named hold NaN or infinities.

        What `save` has written is not read: it has looked at everything, and says so beside the weights. The files of
        older builds and of other tools are read at the speed of the disk.

        Raises:
            CheckpointError: names the file and the tensor.
        """
        if _DIGEST_KEY in self._metadata():
            return
        with self._reader() as reader:
            for name in names:
                if not is_finite(reader.get_tensor(name)):
                    raise CheckpointError(f"{self.weights_path}: tensor {name!r} {NOT_FINITE}; make the file again")

    def stored_digest(self) -> str | None:
        """The backbone's digest as `save` wrote it beside the weights; None in files of older builds."""
        metadata = self._metadata()
        return metadata.get(_DIGEST_KEY) or metadata.get(_OLDER_DIGEST_KEY)

    def load(
        self, num_chains: int | None = None, dtype: torch.dtype | None = None, device: torch.device = CPU
    ) -> ChainTransformer:
        """Build the model of the first `num_chains` chains and nothing else.

        Args:
            num_chains: 1..n; None for all.
            dtype: cast to this; None keeps what is stored.
            device: where the weights go.
        """
        with torch.device("meta"):
            model = ChainTransformer(self.config, num_chains)
        assign(model, self.tensors(name for name, _ in model.named_parameters()), dtype, device)
        return model

    def load_in_panels(self, layout: WeightLayout, num_chains: int | None = None) -> ChainTransformer:
        """Build the model for few rows on the CPU: what multiplies them lies in panels, copied from the file.

        Args:
            layout: what becomes of the weights; as they are, in a dtype for which `colm_kernels.panels.pays`. Those of
                drafts come without an embedding, unless it is the head: drafts are looked up in the whole model's.
            num_chains: 1..n; None for all.

        Raises:
            ConfigError: a matrix cannot be quantised.
        """
        with torch.device("meta"):
            model = ChainTransformer(self.config, num_chains)
        # Each by a reader of its own, with which its pages go.
        laid_out = frozenset(lay_out_in_panels(model.multiplied, lambda name: self.tensors([name])[name], layout))
        others = [name for name, _ in model.named_parameters() if name not in laid_out]
        if layout.only_drafts:
            others = [name for name in others if not name.startswith("embedding.")]
        assign(model, self.tensors(others), layout.dtype)
        return model

    def _metadata(self) -> dict[str, str]:
        with self._reader() as reader:
            return reader.metadata() or {}

    def _reader(self) -> Any:
        try:
            require_weights(self.weights_path)
            return safe_open(self.weights_path, framework="pt")
        except FileNotFoundError as err:
            raise CheckpointError(f"{self.weights_path} is missing") from err
        except (SafetensorError, OSError, RuntimeError) as err:  # the last where it cannot be mapped
            raise CheckpointError(f"{self.weights_path} is truncated or not a safetensors file: {err}") from err

    def _check_tensors(self) -> None:
        with self._reader() as reader:
            stored = set(reader.keys())
            if (fewest := self.config.num_layers * self.config.num_chains) > len(stored):
                raise CheckpointError(
                    f"{self.weights_path} has {len(stored)} tensors; num_layers={self.config.num_layers} with "
                    f"{self.config.num_chains} chains needs more than {fewest}"
                )
            for name, shape in parameter_shapes(self.config).items():
                if name not in stored:
                    raise CheckpointError(f"{self.weights_path}: tensor {name!r} is missing")
                part = reader.get_slice(name)
                if (dtype := part.get_dtype()) not in _STORED_DTYPES:
                    raise CheckpointError(
                        f"{self.weights_path}: tensor {name!r} is stored as {dtype}, not as {', '.join(_STORED_DTYPES)}"
                    )
                found = torch.Size(part.get_shape())
                if found != shape:
                    raise CheckpointError(
                        f"{self.weights_path}: tensor {name!r} has shape {tuple(found)}, expected {tuple(shape)}"
                    )


def assign(
    model: ChainTransformer, tensors: Mapping[str, Tensor], dtype: torch.dtype | None, device: torch.device = CPU
) -> None:
    """Put tensors into a model built on the meta device; parameters not given stay there, without memory."""
    placed = dict(tensors)
    if device.type != "cpu":
        placed = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
    elif dtype is not None:
        # What needs no copy stays in the file's pages, which all nodes of a machine share.
        placed |= side_by_side({name: tensor for name, tensor in tensors.items() if tensor.dtype != dtype}, dtype)
    model.load_state_dict(placed, strict=False, assign=True)
    model.requires_grad_(False).eval()


def load(
    path: str | os.PathLike[str], num_chains: int | None = None, dtype: torch.dtype | None = None
) -> ChainTransformer:
    """Open a checkpoint and build the model of its first `num_chains` chains; see `Checkpoint`."""
    return Checkpoint.open(path).load(num_chains, dtype)


def save(
    path: str | os.PathLike[str],
    config: ChainConfig,
    tensors: Mapping[str, Tensor],
    *,
    text: TextConfig | None = None,
    tokenizer_json: bytes | None = None,
) -> Checkpoint:
    """Write a checkpoint; it appears whole or not at all, and replaces an older one at the same path.

    Args:
        path: the directory to write.
        config: shape of the model.
        tensors: exactly the tensors that `parameter_shapes(config)` names.
        text: prompt and stop conventions.
        tokenizer_json: contents of tokenizer.json; None for a model that serves token ids.

    Returns:
        The checkpoint, opened and checked.

    Raises:
        CheckpointError: a tensor is missing, misshapen, not of this model or not finite, or `path` is something else.
    """
    target = Path(path).absolute()
    if target.exists() and not _may_replace(target):
        raise CheckpointError(f"{target} exists and is not a checkpoint; choose another path or remove it")
    expected = parameter_shapes(config)
    if unknown := sorted(set(tensors) - set(expected)):
        raise CheckpointError(f"tensors {unknown[:3]} do not belong to this model")
    if missing := sorted(set(expected) - set(tensors)):
        raise CheckpointError(f"tensors {missing[:3]} of this model are missing")
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise CheckpointError(f"tensor {name!r} {NOT_FINITE}; {target} is not written")
    with staged(target) as whole:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            whole / WEIGHTS_FILE,
            # In the weights file itself, so that replacing the weights replaces their digest too.
            metadata={_DIGEST_KEY: _digest(config, tensors.__getitem__)},
        )
        body = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "model": config.to_dict(),
            "text": asdict(text or TextConfig()),
        }
        (whole / CONFIG_FILE).write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")
        if tokenizer_json is not None:
            (whole / TOKENIZER_FILE).write_bytes(tokenizer_json)
        Checkpoint.open(whole)
    return Checkpoint.open(target)


def backbone_digest(checkpoint: Checkpoint) -> str:
    """SHA-256 over everything of chain 1 that keys and values depend on.

    The final norm and the head are left out: retraining them, or any later chain, leaves every cached key and
    value valid. `save` stores the digest, so a node starts without reading all of chain 1. Files of older builds have
    none, and it is computed.
    """
    return checkpoint.stored_digest() or _computed_digest(checkpoint)


def verify_backbone(checkpoint: Checkpoint) -> None:
    """Check chain 1's weights against the digest that was written with them.

    Raises:
        CheckpointError: they do not match, or there is none.
    """
    stored, path = checkpoint.stored_digest(), checkpoint.weights_path
    if stored is None:
        raise CheckpointError(
            f"{path} has no digest to verify: an older build wrote it; "
            f"`colm slice {checkpoint.path} DEST --chains {checkpoint.config.num_chains}` writes the model with one"
        )
    if stored != _computed_digest(checkpoint):
        raise CheckpointError(
            f"{path}: chain 1's weights do not match the digest written with them; restore the file or make it again"
        )


def _computed_digest(checkpoint: Checkpoint) -> str:
    return _digest(checkpoint.config, lambda name: checkpoint.tensors([name])[name])


def _digest(config: ChainConfig, tensor_of: Callable[[str], Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(prefill_tensor_names(config)):
        tensor = tensor_of(name).detach().cpu().contiguous()
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def prefill_tensor_names(config: ChainConfig) -> set[str]:
    """Names of the tensors a prefill needs: chain 1's, without the final norm, the head, and most of the last layer.

    The last layer's norm and key and value projections stay; its attention and feed-forward feed only the head.
    """
    last = f"layers.{config.num_layers - 1}."
    last_needed = tuple(f"{last}{part}." for part in ("attention_norm", "attention.wk", "attention.wv"))
    return {
        name
        for name in parameter_shapes(config, 1)
        if not name.startswith(("final_norm.", "head.")) and (not name.startswith(last) or name.startswith(last_needed))
    }


def _may_replace(target: Path) -> bool:
    """Whether the directory is empty or a checkpoint, whose weights may be damaged."""
    if not target.is_dir():
        return False
    try:
        body = read_json_object(target / CONFIG_FILE)
    except FileNotFoundError:
        return not any(target.iterdir())
    except CheckpointError:
        return False
    return body.get("format") == FORMAT


def _read_config(path: Path) -> tuple[ChainConfig, TextConfig]:
    try:
        body = read_json_object(path)
    except FileNotFoundError as err:
        raise CheckpointError(f"{path} is missing; is {path.parent} a checkpoint made by `colm import`?") from err
    if body.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a {FORMAT}; run `colm import {path.parent} DEST` first")
    if body.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format_version={body.get('format_version')!r}, this build reads {FORMAT_VERSION}"
        )
    model: Any = body.get("model")
    text: Any = body.get("text", {})
    for name, section in (("model", model), ("text", text)):
        if not isinstance(section, dict):
            raise CheckpointError(f"{path}: {name} must be an object")
    ends = text.get("eos_token_ids", [])
    try:
        config = ChainConfig.from_dict(model)
        return config, TextConfig(**text | {"eos_token_ids": tuple(ends) if isinstance(ends, list) else ends})
    except (TypeError, ValueError) as err:
        raise CheckpointError(f"{path}: {err}") from err

"""Damaged model files, chat templates and tokenizers, each read as the project reads it."""

import json
import random
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import normalizers, pre_tokenizers

from colm.checkpoint import Checkpoint, TextConfig, prefill_tensor_names, save
from colm.convert import from_gguf, from_huggingface
from colm.convert.huggingface import layout_of
from colm.text.tokenizer import Tokenizer
from tests.fuzz import mutations
from tests.tiny import CHAT_TEMPLATE, MERGES, random_tensors, tiny_config, tiny_tokenizer

CONFIG = tiny_config(chains=(2,), num_layers=1, num_kv_heads=2, vocab_size=288, max_context=64)
_SAMPLE = "the end and <|im_end|> of é "


def read_checkpoint(path: Path) -> None:
    """Do with a checkpoint what both nodes and the gateway do as they start."""
    checkpoint = Checkpoint.open(path)
    checkpoint.require_finite(prefill_tensor_names(checkpoint.config))
    checkpoint.load(1)
    if (tokenizer := Tokenizer.load(checkpoint)) is not None:
        use(tokenizer)


def use(tokenizer: Tokenizer) -> None:
    """Encode and decode a little, as requests do."""
    tokenizer.bound  # noqa: B018 - computed once, as the gateway does
    ids = tokenizer.encode_prompt(document=_SAMPLE, prompt=_SAMPLE, chat=tokenizer.has_chat_template)
    tokenizer.decode(ids)
    tokenizer.encode(_SAMPLE * 3)


class GgufFiles:
    """A GGUF file of a tiny model, damaged as bytes or part by part."""

    # Numbers of GGUF's value types.
    _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY, _UINT64 = 4, 5, 6, 7, 8, 9, 10

    def __init__(self, folder: Path) -> None:
        self._source, self._dest = folder / "model.gguf", folder / "colm"
        tokenizer = tiny_tokenizer()
        tokens = [tokenizer.id_to_token(token_id) for token_id in range(tokenizer.get_vocab_size())]
        numbers = {
            "context_length": CONFIG.max_context,
            "embedding_length": CONFIG.dim,
            "block_count": CONFIG.num_layers,
            "feed_forward_length": CONFIG.hidden_dim,
            "attention.head_count": CONFIG.num_heads,
            "attention.head_count_kv": CONFIG.num_kv_heads,
        }
        self._fields: list[tuple[str, int, Any]] = [
            ("general.architecture", self._STRING, "llama"),
            ("general.alignment", self._UINT32, 32),
            *((f"llama.{key}", self._UINT32, number) for key, number in numbers.items()),
            ("llama.rope.freq_base", self._FLOAT32, 10_000.0),
            ("llama.rope.scaling.type", self._STRING, "yarn"),
            ("llama.rope.scaling.factor", self._FLOAT32, 2.0),
            ("llama.attention.layer_norm_rms_epsilon", self._FLOAT32, 1e-5),
            ("tokenizer.ggml.model", self._STRING, "gpt2"),
            ("tokenizer.ggml.pre", self._STRING, "smollm"),
            ("tokenizer.ggml.tokens", self._ARRAY, (self._STRING, tokens)),
            ("tokenizer.ggml.scores", self._ARRAY, (self._FLOAT32, [-float(rank) for rank in range(len(tokens))])),
            ("tokenizer.ggml.token_type", self._ARRAY, (self._INT32, [3, 3, 3] + [1] * (len(tokens) - 3))),
            ("tokenizer.ggml.merges", self._ARRAY, (self._STRING, [" ".join(pair) for pair in MERGES])),
            ("tokenizer.ggml.bos_token_id", self._UINT32, 1),
            ("tokenizer.ggml.eos_token_id", self._UINT32, 2),
            ("tokenizer.ggml.add_bos_token", self._BOOL, True),
            ("tokenizer.ggml.unknown_token_id", self._UINT32, 0),
        ]
        self._tensors = {_gguf_name(name): tensor for name, tensor in random_tensors(CONFIG).items()}
        self._read(self._whole(self._fields, self._infos()))

    def run(self, rng: random.Random) -> None:
        """One damaged file."""
        fields, infos = list(self._fields), self._infos()
        if rng.random() < 0.3:
            whole = self._whole(fields, infos)
            return self._read(mutations.data(rng, whole, whole.index(b"token_embd.weight") + 800))
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.7:
                self._change_field(rng, fields)
            else:
                self._change_tensor(rng, infos)
        counts = (rng.choice(mutations.INTEGERS), None) if rng.random() < 0.05 else (None, None)
        return self._read(self._whole(fields, infos, counts))

    def _change_field(self, rng: random.Random, fields: list[tuple[str, int, Any]]) -> None:
        at = rng.randrange(len(fields))
        key, kind, content = fields[at]
        match rng.randrange(7):
            case 0:
                del fields[at]
            case 1:
                fields.insert(at, fields[rng.randrange(len(fields))])
            case 2:
                fields[at] = (key, kind, fields[rng.randrange(len(fields))][2])
            case 3 if isinstance(content, tuple) and content[1]:
                entries = list(content[1])
                entries[rng.randrange(len(entries))] = mutations.value(rng)
                fields[at] = (key, kind, (content[0], entries[: rng.choice((None, 1, 5, -1))]))
            case 4:
                fields[at] = (key, rng.randrange(14), content)
            case 5:
                fields[at] = (key, self._ARRAY, (rng.randrange(14), [mutations.value(rng)] * rng.randrange(4)))
            case _:
                kind = rng.choice((kind, self._UINT32, self._FLOAT32, self._STRING, self._UINT64))
                fields[at] = (key, kind, mutations.value(rng))

    def _change_tensor(self, rng: random.Random, infos: list[list[Any]]) -> None:
        info = rng.choice(infos)
        match rng.randrange(5):
            case 0:
                info[0] = rng.choice((rng.choice(infos)[0], rng.choice(mutations.TEXTS), "blk.9.attn_q.weight"))
            case 1:
                info[1] = [rng.choice((size, *mutations.INTEGERS)) for size in info[1]] * rng.choice((1, 1, 2, 0))
            case 2:
                info[2] = rng.choice((0, 1, 2, 8, 14, 30, rng.getrandbits(32)))
            case 3:
                info[3] = rng.choice((info[3] + 1, info[3] + 32, *mutations.INTEGERS))
            case 4:
                infos.remove(info)
                if not infos:
                    infos.append(info)

    def _infos(self) -> list[list[Any]]:
        infos, offset = [], 0
        for name, tensor in self._tensors.items():
            infos.append([name, list(reversed(tensor.shape)), 0, offset])
            offset += -(-tensor.nbytes // 32) * 32
        return infos

    def _whole(self, fields: Any, infos: Any, counts: tuple[int | None, int | None] = (None, None)) -> bytes:
        head = b"GGUF" + struct.pack("<I", 3)
        for given, found in zip(counts, (infos, fields), strict=True):
            head += _packed("<Q", len(found) if given is None else given)
        for key, kind, content in fields:
            head += self._text(key) + struct.pack("<I", kind) + self._value(kind, content)
        for name, shape, kind, offset in infos:
            head += self._text(name) + struct.pack("<I", len(shape))
            head += b"".join(_packed("<Q", size) for size in shape) + _packed("<I", kind) + _packed("<Q", offset)
        head += b"\0" * (-len(head) % 32)
        return head + b"".join(
            tensor.numpy().tobytes() + b"\0" * (-tensor.nbytes % 32) for tensor in self._tensors.values()
        )

    def _text(self, content: object) -> bytes:
        written = str(content).encode("utf-8", "surrogatepass") if not isinstance(content, int) else b"int"
        return struct.pack("<Q", len(written)) + written

    def _value(self, kind: int, content: Any) -> bytes:
        if kind == self._STRING:
            return self._text(content)
        if kind == self._ARRAY:
            inner, entries = content if isinstance(content, tuple) else (self._STRING, [content])
            body = b"".join(self._value(inner, entry) for entry in entries)
            return struct.pack("<IQ", inner, len(entries)) + body
        layout = {4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d", 0: "<B", 1: "<b", 2: "<H", 3: "<h"}
        return _packed(layout.get(kind, "<I"), content)

    def _read(self, whole: bytes) -> None:
        self._source.write_bytes(whole)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that only token ids are served
            from_gguf(self._source, self._dest)
        read_checkpoint(self._dest)


class HuggingFaceFolders:
    """A Hugging Face directory of a tiny model, one of its files damaged."""

    def __init__(self, folder: Path) -> None:
        self._whole, self._source, self._dest = folder / "whole", folder / "hf", folder / "colm"
        self._whole.mkdir()
        tensors, layout = random_tensors(CONFIG), layout_of(CONFIG)
        names = {ours.replace("{}", "0"): theirs.replace("{}", "0") for ours, theirs in layout.items()}
        save_file({names[name]: tensor for name, tensor in tensors.items()}, self._whole / "model.safetensors")
        (self._whole / "tokenizer.json").write_text(tiny_tokenizer().to_str())
        self._bodies: dict[str, Any] = {
            "config.json": {
                "architectures": ["LlamaForCausalLM"],
                "model_type": "llama",
                "hidden_size": CONFIG.dim,
                "intermediate_size": CONFIG.hidden_dim,
                "num_hidden_layers": CONFIG.num_layers,
                "num_attention_heads": CONFIG.num_heads,
                "num_key_value_heads": CONFIG.num_kv_heads,
                "head_dim": CONFIG.head_dim,
                "vocab_size": CONFIG.vocab_size,
                "rms_norm_eps": 1e-5,
                "max_position_embeddings": CONFIG.max_context,
                "hidden_act": "silu",
                "tie_word_embeddings": False,
                "bos_token_id": 1,
                "eos_token_id": [2],
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 2.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "rope_theta": 10000.0,
                },
            },
            "generation_config.json": {"eos_token_id": [2, 0]},
            "tokenizer_config.json": {
                "bos_token": {"content": "<|im_start|>"},
                "eos_token": "<|im_end|>",
                "add_bos_token": True,
                "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
            },
            "model.safetensors.index.json": {"weight_map": dict.fromkeys(names.values(), "model.safetensors")},
        }
        for name, body in self._bodies.items():
            (self._whole / name).write_text(json.dumps(body))
        self._fresh()
        self._read()

    def run(self, rng: random.Random) -> None:
        """One damaged directory."""
        self._fresh()
        names = ["config.json"] * 4 + [*self._bodies, "model.safetensors", "tokenizer.json"]
        name = rng.choice(names)
        path = self._source / name
        if rng.random() < 0.05:
            mutations.replace_file(rng, path)
        elif name == "model.safetensors":
            path.write_bytes(damaged_safetensors(rng, path.read_bytes()))
        elif name == "tokenizer.json":
            path.write_bytes(mutations.text(rng, json.loads(path.read_text())))
        else:
            path.write_bytes(mutations.text(rng, self._bodies[name]))
        self._read()

    def _fresh(self) -> None:
        shutil.rmtree(self._source, ignore_errors=True)
        shutil.copytree(self._whole, self._source)

    def _read(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from_huggingface(self._source, self._dest)
        Checkpoint.open(self._dest).load(1)


class Checkpoints:
    """A checkpoint, one of its files damaged."""

    def __init__(self, folder: Path) -> None:
        self._whole, self._copy = folder / "whole", folder / "colm"
        # Without a chat template, whose child takes a hundred times as long as all the rest.
        text = TextConfig(bos_token_id=1, eos_token_ids=(2,), add_bos=True)
        save(self._whole, CONFIG, random_tensors(CONFIG), text=text, tokenizer_json=tiny_tokenizer().to_str().encode())
        self._body = json.loads((self._whole / "config.json").read_text())
        read_checkpoint(self._whole)

    def run(self, rng: random.Random) -> None:
        """One damaged checkpoint."""
        shutil.rmtree(self._copy, ignore_errors=True)
        shutil.copytree(self._whole, self._copy)
        name = rng.choice(("config.json", "config.json", "model.safetensors", "tokenizer.json"))
        path = self._copy / name
        if rng.random() < 0.1:
            mutations.replace_file(rng, path)
        elif name == "model.safetensors":
            path.write_bytes(damaged_safetensors(rng, path.read_bytes()))
        else:
            body = self._body if name == "config.json" else json.loads(path.read_text())
            path.write_bytes(mutations.text(rng, body))
        read_checkpoint(self._copy)


class Tokenizers:
    """A tokenizer.json, damaged, and one of several kinds."""

    def __init__(self, _: Path) -> None:
        plain = tiny_tokenizer()
        split, changed = tiny_tokenizer(), tiny_tokenizer()
        split.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        changed.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("a", "b")])
        self._bodies = [json.loads(tokenizer.to_str()) for tokenizer in (plain, split, changed)]
        for body in self._bodies:
            self._use(json.dumps(body))

    def run(self, rng: random.Random) -> None:
        """One damaged tokenizer."""
        body = rng.choice(self._bodies)
        # The vocabulary is most of the file, and one of its entries is like the others.
        parts = {key: part for key, part in body.items() if key != "model"}
        model = {key: part for key, part in body["model"].items() if key != "vocab"}
        match rng.randrange(4):
            case 0:
                written = mutations.text(rng, body).decode("utf-8", "replace")
            case 1:
                written = json.dumps(body | {"model": {**mutations.tree(rng, model), "vocab": body["model"]["vocab"]}})
            case _:
                written = json.dumps({**mutations.tree(rng, parts), "model": body["model"]})
        self._use(written)

    def _use(self, written: str) -> None:
        use(
            Tokenizer(
                written.encode("utf-8", "surrogatepass"), TextConfig(bos_token_id=1, eos_token_ids=(2,)), _no_date
            )
        )


class Templates:
    """A chat template that is damaged, or a hostile one."""

    _HOSTILE = (
        "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
        "{{ 2**1000000000 }}",
        "{{ 'a' * 10**10 }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{% set x = namespace(a='b') %}{% for i in range(60) %}{% set x.a = x.a ~ x.a %}{% endfor %}{{ x.a }}",
        "{{ messages[0].content * 5 }}",
        "{{ raise_exception('no') }}",
        "{{ strftime_now('%Y' * 100000) }}",
    )
    _PARTS = (
        "{{",
        "}}",
        "{%",
        "%}",
        "{#",
        "|tojson",
        "loop",
        "['content']",
        "**",
        "range(99999)",
        "\0",
        "\ud800",
        "-%}",
    )

    def __init__(self, _: Path) -> None:
        self._tokenizer_json = tiny_tokenizer().to_str().encode()
        self._use(CHAT_TEMPLATE)

    def run(self, rng: random.Random) -> None:
        """One damaged template."""
        if rng.random() < 0.1:
            return self._use(rng.choice(self._HOSTILE))
        source = CHAT_TEMPLATE
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(source))
            source = source[:at] + rng.choice(self._PARTS) + source[at + rng.choice((0, 1, 5)) :]
        return self._use(source)

    def _use(self, source: str) -> None:
        text = TextConfig(bos_token_id=1, eos_token_ids=(2,), chat_template=source)
        tokenizer = Tokenizer(self._tokenizer_json, text, _no_date)
        tokenizer.encode_prompt(document=_SAMPLE, prompt=_SAMPLE, chat=True)


def damaged_safetensors(rng: random.Random, whole: bytes) -> bytes:
    """A safetensors file whose header, bytes or numbers are damaged."""
    num_header_bytes = int.from_bytes(whole[:8], "little")
    match rng.randrange(3):
        case 0:
            return mutations.data(rng, whole, 8 + num_header_bytes)
        case 1:
            header = mutations.text(rng, json.loads(whole[8 : 8 + num_header_bytes]))
            return len(header).to_bytes(8, "little") + header + whole[8 + num_header_bytes :]
        case _:
            changed = bytearray(whole)
            at = 8 + num_header_bytes + 4 * rng.randrange((len(whole) - 8 - num_header_bytes) // 4)
            changed[at : at + 4] = struct.pack("<f", rng.choice((float("nan"), float("inf"), 3e38)))
            return bytes(changed)


def _packed(layout: str, content: Any) -> bytes:
    """A number as it is written where it fits, and cut down where it does not."""
    if layout in ("<f", "<d"):
        try:
            return struct.pack(layout, content)
        except (OverflowError, struct.error):
            return struct.pack(layout, float("inf"))
    num_bytes = struct.calcsize(layout)
    whole = content if isinstance(content, int) else 0
    return (whole % 256**num_bytes).to_bytes(num_bytes, "little")


def _gguf_name(ours: str) -> str:
    from tests.unit.test_convert_gguf import gguf_name

    return gguf_name(ours)


def _no_date() -> Any:
    from datetime import UTC, datetime

    return datetime(2026, 1, 1, tzinfo=UTC)


FILES: dict[str, Callable[[Path], Any]] = {
    "gguf": GgufFiles,
    "huggingface": HuggingFaceFolders,
    "checkpoint": Checkpoints,
    "tokenizer": Tokenizers,
    "template": Templates,
}
torch.set_num_threads(1)

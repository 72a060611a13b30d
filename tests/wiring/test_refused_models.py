"""A model that cannot be served: one line, status 2, and nothing was started for it."""

import json
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from chatserve.early_checks import examine
from chatserve.errors import StartError
from tests.wiring.server import completed

DEMONSTRATION = Path(str(files("chatserve.demonstration") / "model"))
# A config of another family, as its makers write it: without the number of positions.
BLOOM = {"model_type": "bloom", "vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}
MPT = {"model_type": "mpt", "vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4}

Break = Callable[[Path], object]


def writing(name: str, text: str) -> Break:
    return lambda folder: (folder / name).write_text(text)


def config(**changes: object) -> Break:
    def change(folder: Path) -> None:
        stated = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(stated | changes))

    return change


BROKEN: dict[str, tuple[Break, str]] = {
    "no json": (writing("config.json", "{"), "config of"),
    "unknown kind": (writing("config.json", '{"model_type": "none-such"}'), "none-such"),
    "no language model": (writing("config.json", '{"model_type": "vit"}'), "not a causal"),
    "bloom": (writing("config.json", json.dumps(BLOOM)), "ALiBi"),
    "mpt": (writing("config.json", json.dumps(MPT)), "ALiBi"),
    "quantized": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "Quantized"),
    "positions": (config(max_position_embeddings=0), "how many positions"),
    "rotary": (
        config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "Dynamic NTK",
    ),
    "sampling": (writing("generation_config.json", '{"top_p": 7}'), "'top_p' must be from"),
    "weights": (writing("model.safetensors", "none at all, but long enough"), "is broken"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer is text": (writing("tokenizer.json", "garbage"), "tokenizer.json cannot be read"),
    "tokenizer is empty": (writing("tokenizer.json", "{}"), "is no tokenizer's: it has no 'model'"),
    "tokenizer is a list": (writing("tokenizer.json", "[1]"), "is no tokenizer's"),
    "tokenizer is half": (writing("tokenizer.json", '{"model": {}}'), "it has no 'added_tokens'"),
    "tokenizer is nobody's": (
        writing("tokenizer.json", '{"model": {"type": "X"}, "added_tokens": []}'),
        "has no usable tokenizer",
    ),
    "template": (writing("chat_template.jinja", "{% if %}"), "template"),
}


def broken(kind: str, folder: Path) -> str:
    """Break a copy of the demonstration model; words of the refusal."""
    shutil.copytree(DEMONSTRATION, folder)
    damage, words = BROKEN[kind]
    damage(folder)
    return words


@pytest.mark.parametrize("kind", BROKEN)
def test_everything_but_the_weights_is_judged_by_itself(kind: str, tmp_path: Path) -> None:
    words = broken(kind, tmp_path / "a-model")
    with pytest.raises(StartError) as caught:
        examine(tmp_path / "a-model", None)
    message = caught.value.message
    print(message)
    assert words in message
    assert "\n" not in message
    assert len(message) < 400


def test_the_demonstration_model_passes() -> None:
    examine(DEMONSTRATION, None)
    examine(DEMONSTRATION, DEMONSTRATION / "chat_template.jinja")


@pytest.mark.parametrize("kind", ["bloom", "rotary", "tokenizer is empty", "template"])
def test_a_model_that_is_refused_costs_one_line_and_starts_nothing(
    kind: str, tmp_path: Path
) -> None:
    folder, data = tmp_path / "a-model", tmp_path / "data"
    words = broken(kind, folder)
    done = completed("serve", str(folder), "--port", "0", "--data-dir", str(data))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("chatserve: ")
    assert words in line
    assert not done.stdout
    begun = {path.name for path in data.iterdir()}
    assert begun <= {"secret", "chatserve.lock"}, (
        "a server of conversations was begun, or weights were read"
    )


def test_a_template_of_ones_own_is_judged_as_early(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{% for %}")
    words = ("--port", "0", "--chat-template", str(template), "--data-dir", str(tmp_path / "data"))
    done = completed("serve", *words)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "template" in line

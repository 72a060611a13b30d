"""A model folder's text side, as the process reads it at its start."""

import json

import pytest

from chatserve.chat.text.text_floor import read_text_floor
from chatserve.chat.values import TextPrompt
from chatserve.errors import ModelRefused
from tests.chat.templates import CHATML, LLAMA3
from tests.chat.vocabularies import pretrained


def test_a_folder_is_read_with_its_stop_ids(tmp_path):
    pretrained("byte_level", CHATML).save_pretrained(tmp_path)
    text = read_text_floor(tmp_path, generation_eos=(3,))
    ids = text.tokenizer.control.ids
    assert text.stop_ids == {3, ids["</s>"], ids["<|im_end|>"]}
    assert text.template is not None


def test_another_template_brings_its_own_end_of_turn(tmp_path):
    pretrained("byte_level", CHATML).save_pretrained(tmp_path)
    (tmp_path / "own.jinja").write_text(LLAMA3)
    text = read_text_floor(tmp_path, template_file=tmp_path / "own.jinja")
    assert text.tokenizer.control.ids["<|eot_id|>"] in text.stop_ids


def test_truncation_and_padding_in_the_file_are_not_applied(tmp_path):
    wrapped = pretrained("byte_level", CHATML)
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    state = json.loads(file.read_text())
    state["truncation"] = {
        "direction": "Right",
        "max_length": 2,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    file.write_text(json.dumps(state))
    text = read_text_floor(tmp_path)
    assert len(text.tokenizer.encode_text(TextPrompt("the dog barks at you").text)) > 2


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ModelRefused, match="tokenizer"):
        read_text_floor(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelRefused, match="tokenizer"):
        read_text_floor(tmp_path)

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from fakes import make_model
from pagewire_core import model_dir
from pagewire_core.errors import StartupError
from pagewire_core.model_dir import resolve_model


def test_a_local_directory_is_taken_as_it_is(tmp_path: Path) -> None:
    model = resolve_model(str(make_model(tmp_path / "m", eos_token_id=7)))
    assert (model.path, model.max_model_len, model.eos_token_ids) == (tmp_path / "m", 128, (7,))


def test_eos_ids_are_those_of_generation_config_or_config_and_the_tokenizers(tmp_path: Path) -> None:
    """A model that was tuned for chats may end its turns with a token that its base model's files do not name."""
    path = make_model(tmp_path / "m", eos_token_id=7)
    (path / "generation_config.json").write_text('{"eos_token_id": [4, 2]}')
    assert resolve_model(str(path)).eos_token_ids == (4, 2)
    tokenizer = {"eos_token": "</s>", "added_tokens_decoder": {"9": {"content": "</s>"}}}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert resolve_model(str(path)).eos_token_ids == (4, 2, 9)
    (path / "generation_config.json").unlink()
    assert resolve_model(str(path)).eos_token_ids == (7, 9)
    make_model(path)
    assert resolve_model(str(path)).eos_token_ids == (9,)
    (path / "tokenizer_config.json").unlink()
    assert resolve_model(str(path)).eos_token_ids == ()


def test_an_end_of_sequence_may_be_known_to_the_tokenizer_alone(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    (path / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    added = [{"id": 3, "content": "<pad>"}, {"id": 5, "content": "</s>"}]
    (path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    assert resolve_model(str(path)).eos_token_ids == (5,)


def test_an_end_of_sequence_that_the_model_cannot_say_is_none(tmp_path: Path) -> None:
    """A row of the logits that is not there: the first request with min_tokens failed its step, and all in it."""
    path = make_model(tmp_path / "m", vocab_size=8, eos_token_id=[7, 8, -1])
    tokenizer = {"eos_token": "</s>", "added_tokens_decoder": {"9": {"content": "</s>"}}}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert resolve_model(str(path)).eos_token_ids == (7,)


def test_weights_that_are_there_once_more_in_another_form_do_not_count(tmp_path: Path) -> None:
    """Mistral's repositories have consolidated.safetensors beside the shards."""
    path = make_model(tmp_path / "m", b"12345")
    (path / "consolidated.safetensors").write_bytes(b"12345")
    assert resolve_model(str(path)).weight_bytes == 5
    shards = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    for name in set(shards.values()):
        (path / name).write_bytes(b"123")
    assert resolve_model(str(path)).weight_bytes == 6


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}', "{"])
def test_an_index_of_shards_that_is_none_is_refused_in_one_sentence(index: str, tmp_path: Path) -> None:
    path = make_model(tmp_path / "m")
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(StartupError, match=r"index.json .*download the model again"):
        resolve_model(str(path)).weight_bytes  # noqa: B018


def test_the_digest_tells_weights_apart_and_not_places(tmp_path: Path) -> None:
    digests = [
        resolve_model(str(make_model(tmp_path / name, weights, **config))).digest()
        for name, weights, config in (
            ("a", b"one", {}), ("b", b"one", {}), ("c", b"two", {}), ("d", b"one", {"rope_theta": 1.0}),
        )
    ]  # fmt: skip
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert len(digests[0]) == 32


def test_windows_of_a_big_file_reach_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_dir, "_WHOLE_FILE_BYTES", 1000)
    monkeypatch.setattr(model_dir, "_WINDOW_BYTES", 16)
    data = (8).to_bytes(8, "little") + bytes(5000)
    first = resolve_model(str(make_model(tmp_path / "a", data))).digest()
    changed_end = resolve_model(str(make_model(tmp_path / "b", data[:-1] + b"x"))).digest()
    changed_header = resolve_model(str(make_model(tmp_path / "c", data[:8] + b"x" + data[9:]))).digest()
    assert len({first, changed_end, changed_header}) == 3


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({}, "no config.json"),
        ({"config.json": "{"}, "safetensors"),
        ({"config.json": "{", "x.safetensors": ""}, "cannot be read as JSON"),
        ({"config.json": "[]", "x.safetensors": ""}, "not a JSON object"),
    ],
)
def test_an_incomplete_directory_ends_the_start_with_a_sentence(
    tmp_path: Path, files: dict[str, str], told: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(StartupError, match=told):
        resolve_model(str(tmp_path))


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no directory"):
        resolve_model(str(tmp_path / "nothing"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="is a file"):
        resolve_model(str(tmp_path / "file"))


def test_a_hub_id_that_is_not_cached_ends_offline_with_a_sentence(tmp_path: Path) -> None:
    code = f"""
from pagewire_core.model_dir import resolve_model
from pagewire_core.errors import StartupError
for model in ("org/no-such-model", "bad name!"):
    try:
        resolve_model(model, None, {str(tmp_path)!r})
    except StartupError as error:
        print(error)
"""
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": ""}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    not_cached, not_an_id = answer.stdout.splitlines()
    assert "not in the local cache" in not_cached
    assert "neither a local directory nor a Hub id" in not_an_id

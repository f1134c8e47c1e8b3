"""nnU-Net's JSON files as users leave them: the error names the file, what is wrong and the cure."""

import json

import pytest

from nnunet_diffusion.files import read_dictionary, read_plans


def written(folder, content):
    path = folder / "plans.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "damaged: it is not valid JSON"),
        (b'{"labels": ', "damaged: it is not valid JSON"),
        ("\u00e4".encode("latin-1"), "damaged: it is not valid JSON"),
        (b'{"labels": ' + b"1" * 5000 + b"}", "Exceeds the limit"),
        (b"[" * 100_000, "recursion"),
        ([], "holds a list, not a dictionary"),
        ({}, "'labels' is missing, but must be a dictionary"),
        ({"labels": "a"}, "'labels' is text, but must be a dictionary"),
        ({"labels": None}, "'labels' is NoneType, but must be a dictionary"),
    ],
)
def test_what_is_no_dictionary_with_its_keys_is_refused(tmp_path, content, reason):
    path = written(tmp_path, content)
    with pytest.raises(ValueError, match="do this") as error:
        read_dictionary(path, "do this", {"labels": dict})
    assert str(path) in str(error.value)
    assert reason in str(error.value)


def test_what_is_there_is_read_and_what_is_missing_named(tmp_path):
    assert read_dictionary(written(tmp_path, {"labels": {"a": 1}}), "do this", {"labels": dict}) == {"labels": {"a": 1}}
    with pytest.raises(FileNotFoundError, match="nowhere.json is missing; do this"):
        read_dictionary(tmp_path / "nowhere.json", "do this")


@pytest.mark.parametrize(
    ("configurations", "reason"),
    [
        ([], "'configurations' is a list"),
        ({"2d": "text"}, "configuration '2d' is text, not a dictionary"),
        ({"2d": {"diffusion": []}}, "'diffusion' of configuration '2d' is a list"),
        ({"2d": {"inherits_from": "2d"}}, "configuration '2d' inherits in a circle"),
        ({"2d": {"inherits_from": "a"}, "a": {"inherits_from": "2d"}}, "inherits in a circle"),
        ({"2d": {"inherits_from": "b"}}, "configuration '2d' inherits from 'b', which is not there"),
    ],
)
def test_plans_whose_configurations_cannot_be_used_are_refused(tmp_path, configurations, reason):
    with pytest.raises(ValueError, match="do this") as error:
        read_plans(written(tmp_path, {"configurations": configurations}), "do this")
    assert reason in str(error.value)

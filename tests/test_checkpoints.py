"""What a manifest vouches for, and who may read what is saved."""

import json
import os
import stat

import pytest
import tiny

from acformer.errors import CheckpointError
from acformer.hf.checkpoints import MANIFEST, latest_valid_checkpoint, load_model, verify_folder, write_manifest


@pytest.fixture
def folder(tmp_path):
    """A model's folder with a manifest."""
    folder = tmp_path / "checkpoint-3"
    tiny.model().save_pretrained(folder)
    tiny.processor().save_pretrained(folder)
    write_manifest(folder)
    return folder


def test_a_whole_folder(folder):
    assert verify_folder(folder) is None
    assert latest_valid_checkpoint(folder.parent, pytest.fail) == folder
    (folder / "README.md").write_text("mine")  # whoever adds a note does no harm
    assert verify_folder(folder) is None


ENTRY = {"size": 0, "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"}


@pytest.mark.parametrize(
    ("manifest", "problem"),
    [
        ("{}", "names no file"),
        ("[]", "names no file"),
        ("3", "names no file"),
        ("null", "names no file"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"config.json": 3}', "gives no size and sha256 for config.json"),
        ('{"config.json": {"size": 3}}', "gives no size and sha256 for config.json"),
        ('{"config.json": {"size": "3", "sha256": "x"}}', "gives no size and sha256 for config.json"),
        ('{"config.json": {"size": 3, "sha256": null}}', "gives no size and sha256 for config.json"),
        (json.dumps({"../outside": ENTRY}), "names a file outside of it: ../outside"),
        (json.dumps({"/dev/null": ENTRY}), "names a file outside of it: /dev/null"),
        (json.dumps({"gone": ENTRY}), "gone is missing"),
        (json.dumps({"empty": ENTRY}), "model.safetensors is not in its manifest"),
        (json.dumps({"empty": {**ENTRY, "size": 1}}), "empty has changed since it was saved"),
        (json.dumps({"empty": {**ENTRY, "sha256": "0"}}), "empty has changed since it was saved"),
    ],
)
def test_a_manifest_that_vouches_for_nothing(folder, manifest, problem):
    (folder / "empty").touch()
    (folder.parent / "outside").touch()
    (folder / MANIFEST).write_text(manifest)
    assert problem in verify_folder(folder)
    passed_over = []
    assert latest_valid_checkpoint(folder.parent, passed_over.append) is None
    assert problem in passed_over[0]
    with pytest.raises(CheckpointError, match="is damaged"):
        load_model(str(folder))


def test_a_save_that_did_not_finish(folder):
    (folder / MANIFEST).unlink()
    assert verify_folder(folder) == "it has no manifest: the save did not finish"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_saved_files_are_readable_by_whom_the_umask_lets(tmp_path, umask):
    """safetensors writes by way of a temporary file, which its owner alone may read."""
    before = os.umask(umask)
    try:
        tiny.model().save_pretrained(tmp_path / "model")
        write_manifest(tmp_path / "model")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../../other.safetensors"}}, r"names '\.\./\.\./other"),
        ({"weight_map": {"a": "/etc/other.safetensors"}}, "names '/etc/other"),
        ({"weight_map": {"a": 3}}, "names 3, which is no file beside it"),
        ([], "is no index of weights"),
    ],
)
def test_an_index_of_weights_stays_in_its_folder(folder, index, message):
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_manifest(folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(str(folder))

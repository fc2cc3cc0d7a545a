"""With HF_HUB_OFFLINE not one connection is tried: for backbones, adapters and data sets of the hub alike."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# In a process of its own: the libraries read the places of their caches when they are imported.
PROGRAM = """
import json, socket
tried = []

def refuse(*arguments, **options):
    tried.append(str(arguments[:1]))
    raise OSError("no connection in this test")

socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = socket.create_connection = refuse

from huggingface_hub import constants

from grasp_lora.errors import GraspError
from grasp_lora.models.adapter_files import read_adapter
from grasp_lora.models.model_settings import BackboneSettings
from grasp_lora.models.backbone import load_backbone
from grasp_lora.data.files import read_hub

steps = {
    "backbone": lambda: load_backbone(BackboneSettings("lab/tiny", dtype="float32")).name,
    "no backbone": lambda: load_backbone(BackboneSettings("lab/none")).name,
    "adapter": lambda: read_adapter("lab/adapter").name,
    "no adapter": lambda: read_adapter("lab/none").name,
    "data": lambda: len(read_hub("lab/sums", None, "train").rows),
    "no data": lambda: len(read_hub("lab/none", None, "train").rows),
}
came, connections = {}, {}
# The counterproof comes last: online, what was refused does try to connect.
for name, step in [*steps.items(), ("online", steps["no adapter"])]:
    constants.HF_HUB_OFFLINE = name != "online"
    tried.clear()
    try:
        came[name] = step()
    except GraspError as error:
        came[name] = str(error)
    connections[name] = len(tried)
print(json.dumps([came, connections]))
"""


@pytest.fixture(scope="module")
def hub_home(tmp_path_factory: pytest.TempPathFactory, tiny_backbone_folder: Path) -> Path:
    """A home of the hub's libraries in which a backbone, an adapter and a data set are cached."""
    import datasets
    from test_bad_inputs import write_tiny_adapter

    home = tmp_path_factory.mktemp("home")
    write_tiny_adapter(home / "adapter")
    for name, folder in (("tiny", tiny_backbone_folder), ("adapter", home / "adapter")):
        repository = home / "hub" / f"models--lab--{name}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    rows = home / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"p{i}", "completion": f"c{i}"}) + "\n" for i in range(5)))
    datasets.load_dataset("json", data_files=str(rows), split="train", cache_dir=str(home / "made"))
    (made,) = (home / "made" / "json").glob("*/*/*/dataset_info.json")
    place = home / "datasets" / "lab___sums" / "default" / "0.0.0" / COMMIT
    shutil.copytree(made.parent, place)
    (place / "json-train.arrow").rename(place / "sums-train.arrow")
    info = json.loads((place / "dataset_info.json").read_text())
    (place / "dataset_info.json").write_text(json.dumps(info | {"dataset_name": "sums", "config_name": "default"}))
    return home


def test_offline_opens_no_socket(hub_home: Path) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS"))}
    env = kept | {"HF_HOME": str(hub_home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=True)
    came, tried = json.loads(done.stdout.splitlines()[-1])
    assert tried.pop("online") > 0  # so the sockets are watched
    assert not any(tried.values()), tried
    assert (came["backbone"], came["adapter"], came["data"]) == ("lab/tiny", "lab/adapter", 5)
    assert "check the name, or download it first" in came["no backbone"]
    assert "there is no such folder, and the hub gave" in came["no adapter"]
    assert came["no data"].startswith("hub:lab/none/train: ")

"""An adapter put on the hub: its own files and nothing else that lies beside them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from grasp_lora.errors import AdapterError, GraspError, RecipeError
from grasp_lora.models.adapter_config import CONFIG_FILE, MOST_BYTES
from grasp_lora.models.export import CARD_FILE
from grasp_lora.models.gguf_adapter import GGUF_FILE
from grasp_lora.models.reading import OUR_FILE, WEIGHTS_FILE, read_adapter
from grasp_lora.storage.reading import RefusedError, expanded, is_folder, read_bounded
from grasp_lora.text.display import escaped, first_line, listed, quoted
from grasp_lora.text.names import without_place

OWN_FILES = (CONFIG_FILE, WEIGHTS_FILE, OUR_FILE, CARD_FILE, GGUF_FILE)
HERE = 'adapter = "."'  # in the card's snippet
PATIENCE = 10  # seconds for a look at the hub


@dataclass(frozen=True)
class Upload:
    """What would be put on the hub.

    Args:
        name: ORG/NAME of the repository.
        private: whether only its owner is to see it.
        files: name -> the file, or the content of a card that was changed for the hub.
        left_out: what else lies in the folder.
        notes: what a reader of the repository will miss, and what is removed there.
        stale: files of an earlier adapter there, which this one does not replace.
    """

    name: str
    private: bool
    files: Mapping[str, Path | bytes]
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    stale: tuple[str, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {name: len(one) if isinstance(one, bytes) else one.stat().st_size for name, one in self.files.items()}


def plan_upload(place: str, name: str, *, public: bool = False, licence: str | None = None) -> Upload:
    """Say what of an adapter folder would be put on the hub, and look what is there; nothing is sent.

    Args:
        place: PEFT adapter folder.
        name: ORG/NAME, the repository.
        public: whether everyone is to see it.
        licence: to state in the card, as the hub calls it, such as `apache-2.0`; None leaves the card's own.

    Raises:
        AdapterError: there is no such adapter, it names a path of this machine, or its card cannot be read.
        RecipeError: the name or the licence is malformed.
    """
    _check_name(name)
    folder = Path(place)
    if not is_folder(folder):
        raise AdapterError(
            f"there is no folder {escaped(place)}; give that of a saved adapter, such as runs/NAME/adapter"
        )
    adapter = read_adapter(folder)
    base = adapter.base_model
    if base is not None and without_place(base) != base:
        raise AdapterError(
            f"adapter {adapter.name}: {CONFIG_FILE} names its base model by a path of this machine ({quoted(base)}), which "
            "nobody else has; `grasp-lora export` writes a copy that names it without"
        )
    own = [folder / file for file in OWN_FILES if (folder / file).is_file()]
    if links := [file.name for file in own if file.is_symlink()]:
        raise AdapterError(f"adapter {adapter.name}: {links[0]} is a link; put the file itself there")
    files: dict[str, Path | bytes] = {file.name: file for file in own}
    notes = []
    stated = f"the base model that the adapter names is {'none' if base is None else quoted(base)}"
    if base is None or "/" not in base or base.startswith("."):
        notes.append(f"{stated}: others cannot load that from the hub")
    elif is_folder(expanded(base)):
        notes.append(f"{stated}, a folder of this machine: on the hub there may be another model of that name, or none")
    if CARD_FILE in files:
        card, states_licence = _card(adapter.name, folder / CARD_FILE, name, licence)
        files[CARD_FILE] = card.encode()
        if not states_licence:
            notes.append("the card states no licence; give one with --license, it usually is that of the base model")
    elif licence is not None:
        raise AdapterError(f"adapter {adapter.name} has no {CARD_FILE} to state a licence in; write one first")
    else:
        notes.append(f"there is no model card ({CARD_FILE})")
    left_out = tuple(sorted(file.name for file in folder.iterdir() if file.name not in files))
    there = _there(name)
    if there is None:
        notes.append(f"{name} could not be looked at: files of an earlier adapter there would stay")
    stale = tuple(file for file in OWN_FILES if file in (there or ()) and file not in (*files, CARD_FILE))
    if stale:
        notes.append(f"of an earlier adapter there, and removed: {listed(stale)}")
    if there and CARD_FILE in there and CARD_FILE not in files:
        notes.append(f"the {CARD_FILE} there stays, though it may be of an earlier adapter")
    return Upload(name, not public, files, left_out, tuple(notes), stale)


def upload(plan: Upload) -> str:
    """Put an adapter on the hub and remove what is stale, in one commit; a repository that is not there is made.

    Returns:
        The address of the repository.

    Raises:
        GraspError: there is no token or no network, the hub refuses, or the repository is public and was not to be, or private.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.errors import HTTPError as NoAnswer  # type: ignore[attr-defined]  # of httpx or httpx2, by version

    token = get_token()
    if token is None:
        raise GraspError("there is no token for the hub: run `hf auth login`, or set HF_TOKEN to one that may write")
    hub = HfApi(token=token)
    try:
        try:
            found = hub.repo_info(plan.name)
            private, there = bool(found.private), _names(found)
        except RepositoryNotFoundError:
            hub.create_repo(plan.name, private=plan.private)
            private, there = plan.private, set()
        if plan.private and not private:
            raise GraspError(f"{plan.name} is there and public: add --public, or choose another name")
        if private and not plan.private:
            raise GraspError(
                f"{plan.name} is there and private: leave --public out, or make it public on the hub first"
            )
        operations: list[Any] = [CommitOperationAdd(file, content) for file, content in plan.files.items()]
        operations += [CommitOperationDelete(file) for file in plan.stale if file in there]
        hub.create_commit(plan.name, operations, commit_message="Upload an adapter with grasp-lora")
    except GraspError:
        raise
    except (HfHubHTTPError, ValueError) as error:  # a card whose metadata the hub does not take is the latter
        raise GraspError(f"{plan.name}: {_refusal(error, plan.name)}") from error
    except (OSError, NoAnswer) as error:
        raise GraspError(
            f"{plan.name}: the hub cannot be reached at {hub.endpoint} ({first_line(error)}); try again when you are online"
        ) from error
    return f"{hub.endpoint}/{plan.name}"


def _there(name: str) -> set[str] | None:
    """The files of a repository on the hub, none where there is no such one; None where that cannot be found out."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
    from huggingface_hub.errors import HTTPError as NoAnswer  # type: ignore[attr-defined]

    token = get_token()
    try:
        return _names(HfApi(token=token).repo_info(name, timeout=PATIENCE))
    except RepositoryNotFoundError:  # to those without a token a private one looks so, too
        return None if token is None else set()
    except (HfHubHTTPError, ValueError, OSError, NoAnswer):
        return None


def _names(found: Any) -> set[str]:
    return {one.rfilename for one in found.siblings or ()}


def _check_name(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        if name.count("/") != 1:
            raise HFValidationError
    except HFValidationError:
        raise RecipeError(
            f"the name on the hub is {quoted(name)}; it must be ORG/NAME, each of Latin letters, digits, `.`, `_` and `-`"
        ) from None


def _card(adapter: str, file: Path, name: str, licence: str | None) -> tuple[str, bool]:
    """The card with its place on the hub in its snippet, and whether it states a licence."""
    from huggingface_hub import ModelCard

    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        raise RecipeError(f"--license is {quoted(licence)}; give it as the hub calls it, such as apache-2.0 or gemma")
    try:
        text = read_bounded(file, MOST_BYTES).decode()
        card: Any = ModelCard(text, ignore_metadata_errors=True)
    except (RefusedError, ValueError, yaml.YAMLError) as error:
        raise AdapterError(f"adapter {adapter}: {CARD_FILE} cannot be read ({first_line(error)}); mend it") from error
    if licence is not None:
        card.data.license = licence
        text = str(card)
    return text.replace(HERE, f'adapter = "{name}"'), card.data.license is not None


def _refusal(error: Exception, name: str) -> str:
    """Say in one line why the hub refused, and what to do."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not know your token (401); run `hf auth login` with one that may write"
    if status == 403:
        return f"your token may not write there (403); take one that may write to {name.split('/')[0]}, or a name of your own"
    if status == 409:
        return "it is there, and your token may not see it (409); choose another name"
    return f"the hub refused: {first_line(error)}"

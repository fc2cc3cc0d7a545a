import pytest
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from grasp_lora.storage.network import hub_problem, not_there


def bare(kind: type[Exception]) -> Exception:
    """An error of the hub's client without the reply that it comes from."""
    return kind.__new__(kind)


def caused(cause: Exception) -> OSError:
    try:
        try:
            raise cause
        except Exception as error:
            raise OSError("org/model is not a local folder\nIf this is a private repository, ...") from error
    except OSError as error:
        return error


@pytest.mark.parametrize(
    ("cause", "problem"),
    [
        (bare(GatedRepoError), "it is gated; accept its terms on huggingface.co and run `hf auth login`"),
        (bare(RepositoryNotFoundError), "or it is private or your token is not valid (then run `hf auth login`)"),
        (HFValidationError("no"), "there is no such folder, and it is no hub id either"),
    ],
)
def test_what_the_hub_says_is_explained(cause, problem):
    assert problem in hub_problem(caused(cause))
    assert problem in not_there(cause)


def test_other_problems_are_told_in_their_own_first_line():
    error = caused(ConnectionError("no route"))
    assert hub_problem(error) is None
    assert not_there(error).endswith(
        "the hub gave: org/model is not a local folder; check the name, or download it first"
    )

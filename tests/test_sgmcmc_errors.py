"""Bad input to sampling: each mistake is refused with the words that say what came and what to do."""

import pytest

from tests import messages_sampling
from tests.messages import Bad


@pytest.mark.parametrize("case", messages_sampling.CASES, ids=lambda case: case.name)
def test_the_message_names_what_came_and_the_way_out(case: Bad) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        case.call()
    missing = [word for word in case.words if word not in str(caught.value)]
    assert not missing, str(caught.value)

"""What several test modules use beside the fixtures of conftest.py, by subject."""

import pytest

pytest.register_assert_rewrite("helpers.stoppable")

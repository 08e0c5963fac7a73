"""Messages and bars are shown by default and hidden inside `hide_progress`."""

from __future__ import annotations

import logging

import pytest

from streamline_hooks.core.progress import get_logger, hide_progress, progress_bar


def test_messages_are_shown_unless_progress_is_hidden(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("tests.core.progress")
    with caplog.at_level(logging.INFO, logger.name):
        logger.info("shown")
        with hide_progress():
            logger.info("hidden")
            logger.warning("urgent")
            assert progress_bar(3, "hidden").disable is True
        logger.info("shown again")
    assert caplog.messages == ["shown", "urgent", "shown again"]

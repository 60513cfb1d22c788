"""Logs as JSON, a line an event; never what anybody said."""

from __future__ import annotations

import datetime
import json
import logging
from typing import Any

LOGGER = logging.getLogger("transformers_moshi_flax.serving")


class JsonLines(logging.Formatter):
    """A record as one line: ``time`` (UTC), ``level``, ``event``, the fields of :func:`log_event`, ``traceback``."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        fields = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def log_event(event: str, **fields: Any) -> None:
    """Log an event with what belongs to it."""
    LOGGER.info(event, extra={"fields": fields})


def log_to(stream: Any) -> None:
    """From now on, every logger of this process writes its lines to ``stream``, ours from the level of information."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines())
    logging.getLogger().handlers = [handler]
    LOGGER.setLevel(logging.INFO)
    # its warning of subprotocols that are not known repeats them, and one may be a token
    logging.getLogger("aiohttp.websocket").setLevel(logging.ERROR)
